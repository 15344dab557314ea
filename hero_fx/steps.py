"""From one Dynamo graph to the graphs of the step kinds: normalise, find branches, plan, rewrite. Nothing is compiled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from hero_fx.passes.autocast import ResolveAutocast
from hero_fx.passes.branches import Structure, find_branches
from hero_fx.passes.cleanup import DropDeadCode, DropUnreadState, state_read
from hero_fx.passes.collapse import CommonSubexpressions, ForwardGathers, SinkScatters, WriteRows
from hero_fx.passes.constants import WriteLiterals
from hero_fx.passes.emit import StateSlot, slots_of, value_of
from hero_fx.passes.extrapolate import ExtrapolateBranches, ReuseBranches
from hero_fx.passes.functionalize import Functionalize
from hero_fx.passes.fused import FuseUpdates, SplitUpdates
from hero_fx.passes.groups import JoinGroups
from hero_fx.passes.memory import Memory
from hero_fx.passes.merge import MergeCaches, find_merges
from hero_fx.passes.narrow import QuantizeState, WriteBytes
from hero_fx.passes.normalize import DropIdentities, normalize
from hero_fx.passes.outputs import OwnOutputs, returned_state
from hero_fx.passes.pipeline import Pass, PassRecord, Pipeline
from hero_fx.passes.plan import Fallback, Recording, Refresh, ScoredRefresh, StepPlan, recordings, resolve, term_slot
from hero_fx.passes.record import RecordFeatures
from hero_fx.passes.refresh import RefreshBranches, RefreshScored
from hero_fx.passes.unflatten import UnflattenProducts
from hero_fx.passes.weigh import WeighFeatures

from . import _compat
from .config import Config
from .policy import Policy
from .selection import PatchSampler

__all__ = ["StateSpec", "StepGraphs", "build_steps", "normalized"]

log = logging.getLogger(__name__)


# Exact rewrites of a literal cached step, in the order in which each finds what the one before laid bare.
_ALGEBRA: tuple[Pass, ...] = (
    CommonSubexpressions(),  # one gather of each table, one index per offset: the rules below compare indices by node
    SinkScatters(),  # the scatter of each branch moves behind the next branch's gather ...
    ForwardGathers(),  # ... which then takes the rows that were scattered
    CommonSubexpressions(),  # the rows of the stream are the same for both rules
    DropDeadCode(),
    WriteRows(),  # state keeps its rows: only sampled ones are written
    DropDeadCode(),
)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One tensor of feature state."""

    slot: StateSlot
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StepGraphs:
    """The graphs of one model at one resolution: what plain compilation would run, and what HERO runs in its place."""

    normal: fx.GraphModule
    """The normalised graph, as the model is."""
    structure: Structure
    plans: tuple[StepPlan, ...]
    """What each kind of cached step does, branch by branch."""
    recordings: tuple[Recording, ...]
    fallbacks: tuple[Fallback, ...]
    """Branches that could not be refreshed and are computed in full instead."""
    full: fx.GraphModule
    """Full step: computes all, records features."""
    cached: tuple[fx.GraphModule, ...]
    """Cached steps, one graph per kind."""
    sampler: PatchSampler | None
    """The patch-wise sampling, where the plan refreshes tokens."""
    records: tuple[PassRecord, ...]
    """What each pass did."""

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """The feature state of one lane: every state tensor that some step graph reads or writes."""
        specs: dict[StateSlot, StateSpec] = {}
        for gm in (self.full, *self.cached):
            for node, slot in slots_of(gm):
                if isinstance(slot, StateSlot):
                    value = value_of(node)
                    spec = StateSpec(slot, tuple(value.shape), value.dtype, value.device)
                    known = specs.setdefault(slot, spec)
                    assert spec == known, f"step graphs disagree about the state {slot.name}: {spec} and {known}"
        return tuple(specs.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of feature state per lane."""
        return sum(spec.nbytes for spec in self.state)


def normalized(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """The normalised form of a Dynamo graph: autocast is explicit, that around the model too."""
    normal = normalize(gm, inputs)
    devices = sorted({value.device.type for value in inputs if isinstance(value, torch.Tensor)})
    around = tuple((device, dtype) for device in devices if (dtype := _compat.autocast_dtype(device)) is not None)
    passes: tuple[Pass, ...] = (
        ResolveAutocast(around=around),  # first, since all others emit and move ops
        Functionalize(),
        DropIdentities(),
        UnflattenProducts(),
        JoinGroups(),
        SplitUpdates(),
        DropDeadCode(),
    )
    with _compat.no_autocast():
        return normal, Pipeline(label="normal", passes=passes)(normal)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes have the same names and fake values."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, (env := {}))  # type: ignore[var-annotated]
    graph.output(output)
    for old, new in env.items():
        new.meta = dict(old.meta)
    return _compat.graph_module(gm, graph)


def build_steps(
    normal: fx.GraphModule,
    structure: Structure,
    policy: Policy,
    config: Config,
    records: tuple[PassRecord, ...] = (),
) -> StepGraphs:
    """Plans and rewrites.

    Raises:
        ValueError: the options do not fit the model (boundary beyond the depth, patch larger than the grid, ...).
    """
    with _compat.no_autocast():  # its casts are explicit in `normal`
        return _build_steps(normal, structure, policy, config, records)


def _build_steps(
    normal: fx.GraphModule,
    structure: Structure,
    policy: Policy,
    config: Config,
    records: tuple[PassRecord, ...],
) -> StepGraphs:
    grid = _grid(structure, config)
    plans, fallbacks = resolve(normal, structure, policy.steps(structure))
    sampler = _sampler(structure, config, grid, plans)
    kept = recordings(plans)
    full = copy_graph(normal)
    done = list(records)
    dtype = None if config.state_dtype is torch.int8 else config.state_dtype  # whole numbers come last, see below
    record: tuple[Pass, ...] = (RecordFeatures(structure=structure, recordings=kept, state_dtype=dtype),)
    done += Pipeline(label="full", passes=record)(full)
    cached = []
    collapse = config.form == "collapsed"
    for number, plan in enumerate(plans):
        gm = copy_graph(normal)
        passes: tuple[Pass, ...] = (
            RefreshBranches(structure=structure, plan=plan, count=sampler.count if sampler else 0, state_dtype=dtype),
            RefreshScored(structure=structure, plan=plan, grid=grid, state_dtype=dtype),
            ExtrapolateBranches(structure=structure, plan=plan, state_dtype=dtype),
            ReuseBranches(structure=structure, plan=plan, state_dtype=dtype),
            OwnOutputs(),
            DropDeadCode(),
        )
        label = "cached" if len(plans) == 1 else f"cached{number}"
        done += Pipeline(label=label, passes=passes + (_ALGEBRA if collapse else ()))(gm)
        cached.append(gm)
    if collapse:
        families = [
            tuple(term_slot(recording.branch, structure.streams, update, i) for i in range(recording.terms))
            for recording in kept
            for update in recording.branch.updates
        ]
        merge = MergeCaches(merges=find_merges(cached, families))
        done += _on_all(full, cached, "merge", (merge, DropDeadCode()))
        unread = DropUnreadState(read=state_read(full, cached))
        done += _on_all(full, cached, "state", (unread, WriteBytes()))
    if config.timeline is not None:
        tables = {
            name: tuple(table.shape[2:]) for name, table in config.timeline.coefficients.items() if "@" not in name
        }
        for number, gm in enumerate(cached):
            done += Pipeline(label=f"cached{number}_plan", passes=(WeighFeatures(tables=tables),))(gm)
    if config.state_dtype is torch.int8:
        done += _on_all(full, cached, "int8", (QuantizeState(),))
    done += _on_all(full, cached, "fuse", (FuseUpdates(),))
    # Comes last: the algebra compares nodes and numbers, and to Python 0.0 is -0.0.
    done += _on_all(full, cached, "constants", (WriteLiterals(),))
    steps = StepGraphs(
        normal=normal,
        structure=structure,
        plans=plans,
        recordings=kept,
        fallbacks=fallbacks,
        full=full,
        cached=tuple(cached),
        sampler=sampler,
        records=tuple(done),
    )
    check_state(steps)
    return steps


def check_state(steps: StepGraphs) -> None:
    """Asserts that the step graphs agree about their state, and that none of it gets out of them."""
    assert steps.state_bytes >= 0
    for gm in (steps.full, *steps.cached):
        returned = returned_state(gm, Memory(gm.graph))
        assert not returned, f"the state {returned[0].name} is an output of a step graph"


def _on_all(
    full: fx.GraphModule, cached: Sequence[fx.GraphModule], label: str, passes: tuple[Pass, ...]
) -> list[PassRecord]:
    """Runs passes that change what state there is on all step graphs of a model, so that they agree."""
    records: list[PassRecord] = []
    for name, gm in (("full", full), *((f"cached{number}", gm) for number, gm in enumerate(cached))):
        records += Pipeline(label=f"{name}_{label}", passes=passes)(gm)
    return records


def find_structure(normal: fx.GraphModule) -> Structure:
    """The residual branches of a normalised graph."""
    return find_branches(normal)


def _grid(structure: Structure, config: Config) -> tuple[int, int, int] | None:
    if config.grid is None:
        return structure.grid
    frames, height, width = config.grid
    if frames * height * width != structure.image_tokens:
        raise ValueError(
            f"grid={config.grid} holds {frames * height * width} tokens but the model has {structure.image_tokens} image "
            "tokens; give (frames, height, width) after patch embedding"
        )
    return frames, height, width


def _sampler(
    structure: Structure, config: Config, grid: tuple[int, int, int] | None, plans: Sequence[StepPlan]
) -> PatchSampler | None:
    strategies = [strategy for plan in plans for _, strategy in plan]
    refreshes = [s for s in strategies if isinstance(s, Refresh)]
    if not refreshes and not any(isinstance(s, ScoredRefresh) for s in strategies):
        return None
    patch = (config.patch[0], config.patch[1], config.patch[2])
    if grid is None:
        # Packed latents do not show their grid. Tokens in a row are neighbours in any: each run of them is a patch.
        log.warning(
            "the token grid of the %d image tokens could not be read from the graph: runs of %d tokens in a row are taken for "
            "patches; pass grid=(frames, height, width) in tokens to hero_fx.backend for patches of %s",
            structure.image_tokens, prod(patch), patch,
        )  # fmt: skip
        grid, patch = (1, 1, structure.image_tokens), (1, 1, min(prod(patch), structure.image_tokens))
    if not refreshes:
        return None
    draws = structure.depth if any(s.per_layer for s in refreshes) else 1
    return PatchSampler(
        grid=grid,
        patch=patch,
        ratio=config.refresh_ratio,
        seed=config.seed,
        draws=draws,
        age_weighting=config.age_weighting,
    )
