"""`hero_fx.save`: what a compiled model runs, compiled ahead of time into a file."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from hero_fx import dynamo
from hero_fx.backends import Backend
from hero_fx.config import Config
from hero_fx.fingerprint import model_config
from hero_fx.passes.emit import value_of
from hero_fx.passes.slots import slots_of
from hero_fx.plan import Fingerprint, Plan
from hero_fx.runtime.stepper import CompiledStep, Stepper
from hero_fx.stack import warn
from hero_fx.step_graphs import copy_graph

from .archive import Archive, Argument, SavedGraph, SavedStep, write
from .asked import Asked, CannotSave, ask
from .called import Called
from .environment import Environment, sources
from .package import compile_package
from .snapshot import differences, snapshot

__all__ = ["fingerprint", "save"]

log = logging.getLogger(__name__)


def save(compiled: Callable[..., Any], path: str | Path) -> None:
    """Compiles what a model became ahead of time, into a file that `hero_fx.load` starts from without compiling.

    ::

        model = torch.compile(transformer, backend=hero_fx.backend(num_steps=50))
        ...  # one call, or a trajectory, at each resolution that is to be saved
        hero_fx.save(model, "transformer.hero")

    The file has the step graphs of each resolution as AOTInductor packages, the options, and the plan; no weights. Each
    step graph is compiled once more, so this takes as long as the first calls did.

    Args:
        compiled: what `torch.compile(module, backend=hero_fx.backend(...))` made, after a call; or the module, after
            `module.compile(...)`.
        path: of the file; it is replaced if it exists.

    Raises:
        ValueError: nothing can be saved; the message says why. What can only be saved in part is, with a warning.
    """
    backend, model = dynamo.backend_of(compiled, Backend), dynamo.uncompiled(compiled)
    if not isinstance(backend, Backend) or not isinstance(model, nn.Module):
        raise ValueError(
            f"compiled={type(compiled).__name__} is no module that was compiled with hero_fx: pass what "
            "torch.compile(module, backend=hero_fx.backend(...)) returned (not by the name 'hero_fx': that makes a backend for "
            "each graph)"
        )
    before = snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        saving = _Saving(backend.config, Path(folder))
        asked = _ask_all(compiled, model, backend)
        changed = differences(before, snapshot(model))
        if changed:
            raise CannotSave(
                f"a call of the model changes the model, which a loaded one cannot do: {'; '.join(changed)}"
            )
        for number, (stepper, called, answer) in enumerate(asked):
            saving.add(number, stepper, called, answer)
        files = {file for _, called, _ in asked for file in called.files} | _files_of_classes(model)
        config, plan = _options(backend.config)
        archive = Archive(
            sources=sources(files),
            model=fingerprint(model),
            modules=before,
            config=config,
            graphs=tuple(saving.graphs),
        )
        device = saving.graphs[0].full.device.type
        try:
            write(Path(path), Environment.current(device), archive, Path(folder), saving.tensors, plan)
        except TypeError as error:
            raise CannotSave(f"{error}; options of hero_fx.backend must be names and numbers") from error


def fingerprint(model: nn.Module) -> Fingerprint:
    """What a model says of itself; depth and width are the graphs' affair."""
    return Fingerprint(name=f"{type(model).__module__}.{type(model).__qualname__}", config=model_config(model))


def _ask_all(compiled: Any, model: nn.Module, backend: Backend) -> list[tuple[Stepper, Called, Asked]]:
    """All graphs of a model that a call still reaches, one for each kind of call, the newest first."""
    found: list[tuple[Stepper, Called, Asked]] = []
    reasons: list[str] = []
    mine = [(s, s.called) for s in backend.steppers if s.called is not None and s.called.module() is model]
    if any(stepper.inputs.shared for stepper, _ in mine):
        raise CannotSave(
            "several processes run this model together, and a file cannot hold their group: keep Inductor's cache directory "
            "(TORCHINDUCTOR_CACHE_DIR) instead"
        )
    for stepper, called in reversed(mine):
        try:
            answer = ask(compiled, model, stepper, called, f"{len(found)}/")
        except CannotSave as error:
            reasons.append(str(error))
            continue
        if any((answer.call, called.conditions) == (a.call, c.conditions) for _, c, a in found):
            log.info("two graphs differ in the strides of their inputs alone: the newer one is saved")
        else:
            found.append((stepper, called, answer))
    if not found:
        why = "; ".join(reasons) or "it has compiled none for this model: call the compiled model once, then save"
        raise CannotSave(f"compiled={type(compiled).__name__} has no step graphs that can be saved: {why}")
    for reason in reasons:
        warn(f"hero_fx.save leaves out a graph: {reason}")
    return found


class _Saving:
    """A file in the making."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.graphs: list[SavedGraph] = []
        self.tensors: dict[str, Tensor] = {}

    def add(self, number: int, stepper: Stepper, called: Called, asked: Asked) -> None:
        """Compiles the step graphs of one kind of call."""
        steps = stepper.graphs
        assert steps is not None
        self.tensors |= asked.tensors
        cached = [
            self._step(f"{number}_cached{kind}.pt2", gm, step, asked)
            for kind, (gm, step) in enumerate(zip(steps.cached, stepper.cached, strict=True))
        ]
        self.graphs.append(
            SavedGraph(
                call=asked.call,
                conditions=called.conditions,
                sources=asked.sources,
                returns=asked.returns,
                leaves=asked.leaves,
                inputs=stepper.inputs,
                state=steps.state,
                sampler=steps.sampler,
                full=self._step(f"{number}_full.pt2", steps.full, stepper.full, asked),
                cached=tuple(cached),
            )
        )

    def _step(self, file: str, gm: fx.GraphModule, step: CompiledStep, asked: Asked) -> SavedStep:
        taken = [
            _contiguous(gm, value) if isinstance(source, Argument) else value
            for source, value in zip(asked.sources, asked.inputs, strict=True)
        ]
        extra = [value_of(node) for node, _ in slots_of(gm)]
        taken += [torch.zeros(value.shape, dtype=value.dtype, device=value.device) for value in extra]
        inputs = [value for value in taken if isinstance(value, Tensor)]
        config = self.config
        compile_package(_of_tensors(gm), inputs, self.folder / file, mode=config.mode, options=config.options)
        return SavedStep(file=file, slots=step.slots, device=step.device)


def _contiguous(gm: fx.GraphModule, value: Tensor) -> Tensor:
    if not value.is_contiguous() and any("as_strided" in str(node.target) for node in gm.graph.nodes):
        raise CannotSave("its graph goes by the strides of an argument that is not contiguous: pass it contiguous")
    return torch.zeros_like(value, memory_format=torch.contiguous_format)


def _of_tensors(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph without inputs that are no tensors: their values are baked in."""
    result = copy_graph(gm)
    for node in result.graph.find_nodes(op="placeholder"):
        if not isinstance(value_of(node), Tensor):
            assert not node.users, f"the size {node.name} is not baked in"
            result.graph.erase_node(node)
    result.recompile()
    return result


def _options(config: Config) -> tuple[dict[str, Any], Plan | None]:
    """The options as plain data, and the plan. Step graphs are compiled already, so that `inner` is not among them."""
    kept = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("inner", "plan")}
    if not isinstance(config.schedule, str):
        kept["schedule"] = tuple(map(bool, config.schedule))
    if config.options is not None:
        kept["options"] = dict(config.options)
    kept["disable_passes"] = tuple(config.disable_passes)
    return kept, config.plan if isinstance(config.plan, Plan) else None


def _files_of_classes(model: nn.Module) -> set[str]:
    """The source files of a model's classes."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    modules = [sys.modules.get(kind.__module__) for kind in classes]
    return {file for module in modules if (file := getattr(module, "__file__", None)) is not None}
