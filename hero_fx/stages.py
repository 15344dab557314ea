"""Every list of passes, in the order in which they run, with the reason for each place.

====================  ===================================================================================
`normalizing`         Dynamo's graph, retraced: one vocabulary, no writes, branches in the form they are found in
`recording`           the full step keeps what cached steps read
`rewriting`           a cached step, literally: every branch by its strategy, with a cache of its own
`COLLAPSING`          exact algebra on that: gather once, scatter once
`merging`             caches that are only ever summed become one, in all step graphs
`shrinking`           state that no step reads goes
`weighing`            coefficients of a calibrated plan
`keeping_rows`        a forecast's steps for a part of the batch, where each part runs by itself
`recording_outputs`   the full step of a forecast
`forecasting`         its cached step
`observing`           the model's own graph, showing the features of its layers
`QUANTIZING`          int8 state, in all step graphs
`FINISHING`           the form that compilers want, in all step graphs
====================  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.normalize.autocast import ResolveAutocast
from hero_fx.passes.normalize.constants import WriteLiterals
from hero_fx.passes.normalize.functionalize import Functionalize
from hero_fx.passes.normalize.fused_updates import FuseUpdates, SplitUpdates
from hero_fx.passes.normalize.identities import DropIdentities
from hero_fx.passes.normalize.join_groups import JoinGroups
from hero_fx.passes.normalize.unflatten import UnflattenProducts
from hero_fx.passes.pipeline import Pass
from hero_fx.passes.rewrite.extrapolate import ExtrapolateBranches, ReuseBranches
from hero_fx.passes.rewrite.forecast import ForecastOutputs, OutputRule, RecordOutputs
from hero_fx.passes.rewrite.observe import Features, ReturnFeatures
from hero_fx.passes.rewrite.outputs import OwnOutputs
from hero_fx.passes.rewrite.plan import Recording, StepPlan
from hero_fx.passes.rewrite.record import RecordFeatures
from hero_fx.passes.rewrite.refresh import RefreshBranches
from hero_fx.passes.rewrite.refresh_scored import RefreshScored
from hero_fx.passes.rewrite.rows_of_batch import KeepRows
from hero_fx.passes.rewrite.weigh import WeighFeatures
from hero_fx.passes.simplify.cleanup import DropDeadCode, DropUnreadState
from hero_fx.passes.simplify.common_subexpressions import CommonSubexpressions
from hero_fx.passes.simplify.merge import MergeCaches
from hero_fx.passes.simplify.quantize import QuantizeState, WriteBytes
from hero_fx.passes.simplify.scatters import ForwardGathers, SinkScatters
from hero_fx.passes.simplify.summands import Merge
from hero_fx.passes.simplify.write_rows import WriteRows
from hero_fx.passes.slots import StateSlot

__all__ = [
    "COLLAPSING", "FINISHING", "OPTIONAL", "QUANTIZING", "forecasting", "keeping_rows", "merging", "normalizing",
    "observing", "recording", "recording_outputs", "rewriting", "shrinking", "weighing", "without",
]  # fmt: skip

Passes = tuple[Pass, ...]


def normalizing(around: Sequence[tuple[str, torch.dtype]]) -> Passes:
    """Of a traced graph; `around`: autocast regions around the model."""
    return (
        ResolveAutocast(around=tuple(around)),  # first, since all others emit and move ops
        Functionalize(),  # from here on a node's value is what it was computed to be
        DropIdentities(),  # nothing stands between a branch and the stream any more
        UnflattenProducts(),  # products keep the token axis an axis
        JoinGroups(),  # a scale for each frame acts on the token axis as it is
        SplitUpdates(),  # x + g * f, the form in which branches are found
        DropDeadCode(),
    )


def recording(structure: Structure, recordings: tuple[Recording, ...], state_dtype: torch.dtype | None) -> Passes:
    """Of a full step."""
    return (RecordFeatures(structure=structure, recordings=recordings, state_dtype=state_dtype),)


def rewriting(
    structure: Structure,
    plan: StepPlan,
    grid: tuple[int, int, int] | None,
    count: int,
    state_dtype: torch.dtype | None,
) -> Passes:
    """Of a cached step; `count`: sampled tokens. Each rewrites branches of its own, so their order is free."""
    return (
        RefreshBranches(structure=structure, plan=plan, count=count, state_dtype=state_dtype),
        RefreshScored(structure=structure, plan=plan, grid=grid, state_dtype=state_dtype),
        ExtrapolateBranches(structure=structure, plan=plan, state_dtype=state_dtype),
        ReuseBranches(structure=structure, plan=plan, state_dtype=state_dtype),
        OwnOutputs(),  # what they put in a branch's place may be what the model returns
        DropDeadCode(),  # the branches themselves
    )


COLLAPSING: Passes = (
    CommonSubexpressions(),  # one gather of each table, one index per offset: the rules below compare indices by node
    SinkScatters(),  # the scatter of each branch moves behind the next branch's gather ...
    ForwardGathers(),  # ... which then takes the rows that were scattered
    CommonSubexpressions(),  # the rows of the stream are the same for both rules
    DropDeadCode(),
    WriteRows(),  # state keeps its rows: only sampled ones are written
    DropDeadCode(),
)
"""Exact rewrites of a literal cached step, in the order in which each finds what the one before laid bare."""


def merging(merges: tuple[Merge, ...]) -> Passes:
    """On all step graphs of a model, so that they agree about their state."""
    return (
        MergeCaches(merges=merges),  # after the scatters have sunk, nothing reads the sums in between
        DropDeadCode(),
    )


def shrinking(read: frozenset[StateSlot]) -> Passes:
    """On all step graphs, once it is known what state any of them reads."""
    return (
        DropUnreadState(read=read),
        WriteBytes(),  # rows of 8-bit floats are written as bytes
    )


def weighing(tables: Mapping[str, tuple[int, ...]]) -> Passes:
    """Of a cached step with calibrated coefficients; `tables`: the shape of each."""
    return (WeighFeatures(tables=dict(tables)),)  # after merging: tables are for merged caches


def keeping_rows(rows: int) -> Passes:
    """Of all step graphs, for so many rows of the batch."""
    return (
        KeepRows(count=rows),
        DropDeadCode(),  # the same for all rows
    )


def recording_outputs(rules: tuple[OutputRule, ...], state_dtype: torch.dtype | None) -> Passes:
    """Of a full step that cached steps forecast from."""
    return (RecordOutputs(rules=rules, state_dtype=state_dtype),)


def forecasting(rules: tuple[OutputRule, ...], state_dtype: torch.dtype | None) -> Passes:
    """Of a cached step that runs no layer."""
    return (
        ForecastOutputs(rules=rules, state_dtype=state_dtype),
        DropDeadCode(),  # the whole model
    )


def observing(structure: Structure, features: Features) -> Passes:
    """Of a graph that shows the features of its layers, to measure how stable they are."""
    return (ReturnFeatures(structure=structure, features=features),)


QUANTIZING: Passes = (QuantizeState(),)  # after the algebra, which knows no scales

FINISHING: Passes = (
    FuseUpdates(),  # the model's own ops again, where no pass has changed them: full steps stay bit for bit
    WriteLiterals(),  # last: the algebra compares nodes and numbers, and to Python 0.0 is -0.0
)

OPTIONAL = frozenset(
    {
        "common_subexpressions",
        "drop_dead_code",
        "drop_identities",
        "drop_unread_state",
        "forward_gathers",
        "fuse_updates",
        "join_groups",
        "merge_caches",
        "sink_scatters",
        "unflatten_products",
        "write_rows",
    }
)
"""What `disable_passes` may name: these preserve numerics up to rounding, and what runs after them does without."""


def without(passes: Passes, disabled: Collection[str]) -> Passes:
    """The passes that are not turned off."""
    return tuple(current for current in passes if current.name not in disabled)
