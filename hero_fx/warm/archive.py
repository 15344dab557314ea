"""The file of a warm start: a zip of metadata (JSON), one package for each step graph, and tensors (safetensors)."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hero_fx.passes import slots
from hero_fx.passes.slots import Slot
from hero_fx.plan import Fingerprint, Plan
from hero_fx.runtime.evidence import Roles
from hero_fx.runtime.inputs import Inputs
from hero_fx.selection import PatchSampler
from hero_fx.step_graphs import StateSpec

from .codec import Codec
from .environment import Environment
from .signature import CallSpec, Conditions, Constant, SameAs, TensorSpec

__all__ = [
    "Archive", "Argument", "Literal", "Output", "Reading", "SavedGraph", "SavedStep", "Stored", "Weight", "read", "write",
]  # fmt: skip

_FORMAT, _VERSION = "hero_fx.steps", 1
_METADATA, _TENSORS, _PLAN = "metadata.json", "tensors.safetensors", "plan.safetensors"


@dataclass(frozen=True, slots=True)
class Argument:
    """A leaf of the call's arguments."""

    index: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter or buffer of the model, or a part of one that is made of several tensors."""

    name: str
    part: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def fits(self, value: Tensor) -> bool:
        """Whether compiled code can take it."""
        return (
            value.shape == self.shape
            and value.dtype == self.dtype
            and value.device == self.device
            and value.stride() == self.stride
        )


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the file."""

    name: str


@dataclass(frozen=True, slots=True)
class Literal:
    """A value that is no tensor: step graphs have it baked in."""

    value: Any


@dataclass(frozen=True, slots=True)
class Output:
    """An output of the graph, as a part of what the model returns."""

    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedStep:
    """One step graph."""

    file: str
    slots: tuple[Slot, ...]
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedGraph:
    """What a model became for one kind of call."""

    call: CallSpec
    conditions: Conditions
    sources: tuple[Argument | Weight | Stored | Literal, ...]
    """Where the inputs of its graph come from."""
    returns: str
    """Structure of what the model returns, as JSON."""
    leaves: tuple[Output | Argument | Literal, ...]
    """And its leaves."""
    inputs: Inputs
    state: tuple[StateSpec, ...]
    sampler: PatchSampler | None
    full: SavedStep
    cached: tuple[SavedStep, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """Everything in the file but packages, tensors, the plan and where it was made."""

    sources: Mapping[str, str]
    """Digests of source files, by Python module."""
    model: Fingerprint
    modules: Mapping[str, str]
    """The model's snapshot."""
    config: Mapping[str, Any]
    """Options of `hero_fx.backend`."""
    graphs: tuple[SavedGraph, ...]


_CODEC = Codec(
    Archive, Environment, Fingerprint, SavedGraph, SavedStep,
    Argument, Weight, Stored, Literal, Output,
    CallSpec, Conditions, TensorSpec, SameAs, Constant,
    Inputs, Roles, StateSpec, PatchSampler,
    slots.FeatureSlot, slots.GateSlot, slots.IndexSlot, slots.KeySlot, slots.PastSlot, slots.RowsSlot, slots.ScalarSlot,
    slots.ScaleSlot, slots.ScoreSlot, slots.TableSlot, slots.Term,
)  # fmt: skip


def write(
    path: Path,
    environment: Environment,
    archive: Archive,
    folder: Path,
    tensors: Mapping[str, Tensor],
    plan: Plan | None,
) -> None:
    """Writes the file; `folder` has the packages.

    Raises:
        TypeError: something in `archive` cannot be written.
    """
    from safetensors.torch import save_file

    known = {"format": _FORMAT, "version": _VERSION} | {
        "environment": _CODEC.encode(environment),
        "archive": _CODEC.encode(archive),
    }
    (folder / _METADATA).write_text(json.dumps(known), encoding="utf-8")
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, folder / _TENSORS)
    if plan is not None:
        plan.save(folder / _PLAN)
    unfinished = path.with_name(f"{path.name}.part")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as file:
        for part in sorted(folder.iterdir()):
            file.write(part, part.name)
    unfinished.replace(path)  # readers never see half a file


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file holds."""

    archive: Archive
    tensors: Mapping[str, Tensor]
    plan: Plan | None


def read(path: Path, folder: Path, check: Callable[[Environment], None]) -> Reading:
    """Reads a file that `write` wrote, and unpacks it into `folder`.

    `check` is told where it was made before anything else is looked at, and raises if that is not good enough.

    Raises:
        ValueError: it is no such file, or of another version, or damaged.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"path={str(path)!r}: there is no such file; hero_fx.save(compiled, path) writes one")
    try:
        with zipfile.ZipFile(path) as file:
            known = json.loads(file.read(_METADATA))
            if known.get("format") != _FORMAT or known.get("version") != _VERSION:
                raise ValueError(
                    f"path={str(path)!r} holds {known.get('format')!r} of version {known.get('version')!r}, and this hero_fx "
                    f"reads {_FORMAT!r} of version {_VERSION}: save anew, or use the hero_fx that wrote it"
                )
            check(_CODEC.decode(known["environment"]))
            archive: Archive = _CODEC.decode(known["archive"])
            file.extractall(folder)
        plan = folder / _PLAN
        return Reading(archive, load_file(folder / _TENSORS), Plan.load(plan) if plan.exists() else None)
    except (zipfile.BadZipFile, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"path={str(path)!r} was not written by hero_fx.save, or is damaged: {type(error).__name__}: {error}"
        ) from error
