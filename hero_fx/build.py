"""From one Dynamo graph to the graphs of the step kinds: normalise, find branches, plan, rewrite. Nothing is compiled.

Which passes run, in which order and why, stands in `stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hero_fx.passes import compat
from hero_fx.passes.analysis.branches import find_branches
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.analysis.tokens import NoRule
from hero_fx.passes.emit import value_of
from hero_fx.passes.normalize.trace import normalize
from hero_fx.passes.pipeline import PassError, PassRecord, Pipeline
from hero_fx.passes.rewrite.features import feature_slots
from hero_fx.passes.rewrite.forecast import outputs_of
from hero_fx.passes.rewrite.plan import recordings
from hero_fx.passes.rewrite.resolve import resolve
from hero_fx.passes.simplify.cleanup import state_read
from hero_fx.passes.simplify.summands import find_merges

from . import stages
from .checks import UnsupportedModel
from .config import Config
from .outputs import check_outputs
from .policy import Forecast, Policy
from .sampling import make_sampler, token_grid
from .step_graphs import StepGraphs, check_state, copy_graph

__all__ = ["build_steps", "find_structure", "normalized"]


def normalized(
    gm: fx.GraphModule, inputs: Sequence[Any], disabled: Sequence[str] = ()
) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """The normalised form of a Dynamo graph: autocast is explicit, that around the model too."""
    normal = normalize(gm, inputs)
    devices = sorted({value.device.type for value in inputs if isinstance(value, torch.Tensor)})
    around = [(device, dtype) for device in devices if (dtype := compat.autocast_dtype(device)) is not None]
    passes = stages.without(stages.normalizing(around), disabled)
    with compat.no_autocast():
        return normal, Pipeline(label="normal", passes=passes)(normal)


def find_structure(normal: fx.GraphModule) -> Structure:
    """The residual branches of a normalised graph."""
    return find_branches(normal)


def build_steps(
    normal: fx.GraphModule,
    structure: Structure,
    policy: Policy,
    config: Config,
    records: tuple[PassRecord, ...] = (),
) -> StepGraphs:
    """Plans and rewrites; `records`: of the passes that made `normal`.

    Raises:
        ValueError: the options do not fit the model (boundary beyond the depth, patch larger than the grid, ...).
    """
    with compat.no_autocast():  # its casts are explicit in `normal`
        build = _Build(normal, config, list(records))
        steps = build.forecast(structure, policy) if isinstance(policy, Forecast) else build.steps(structure, policy)
    check_state(steps)
    return steps


class _Build:
    """Step graphs in the making."""

    def __init__(self, normal: fx.GraphModule, config: Config, records: list[PassRecord]) -> None:
        self.normal = normal
        self.config = config
        self.records = records
        self.full = copy_graph(normal)
        self.cached: list[fx.GraphModule] = []
        self.kinds = 1
        """Of cached steps."""
        self.dtype = None if config.state_dtype is torch.int8 else config.state_dtype  # int8 comes last

    def run(self, label: str, passes: stages.Passes, gm: fx.GraphModule) -> None:
        """Runs passes on one graph."""
        passes = stages.without(passes, self.config.disable_passes)
        self.records += Pipeline(label=label, passes=passes)(gm)

    def run_on_all(self, label: str, passes: stages.Passes) -> None:
        """Runs passes that change what state there is on all step graphs, so that they agree."""
        self.run(f"full_{label}", passes, self.full)
        for name, gm in self.named():
            self.run(f"{name}_{label}", passes, gm)

    def named(self) -> list[tuple[str, fx.GraphModule]]:
        """The cached graphs with the labels of their pipelines."""
        return [("cached" if self.kinds == 1 else f"cached{number}", gm) for number, gm in enumerate(self.cached)]

    def forecast(self, structure: Structure, policy: Forecast) -> StepGraphs:
        """The step graphs of a forecast.

        Raises:
            UnsupportedModel: the rules are for other outputs than the model has.
        """
        check_outputs(self.normal, policy.outputs)
        if policy.parts > 1:
            self.keep_rows(policy)
        self.cached = [copy_graph(self.full)]
        self.run("full", stages.recording_outputs(policy.outputs, self.config.state_dtype), self.full)
        self.run("cached", stages.forecasting(policy.outputs, self.config.state_dtype), self.cached[0])
        return StepGraphs(
            self.normal, structure, (), (), (), self.full, tuple(self.cached), None, tuple(self.records), policy.parts
        )

    def keep_rows(self, policy: Forecast) -> None:
        """Makes the full step that of one part of the batch.

        Raises:
            UnsupportedModel: rows of the batch meet, or are not known not to.
        """
        rows, left = divmod(value_of(outputs_of(self.full)[policy.outputs[0].index]).shape[0], policy.parts)
        if left:
            raise UnsupportedModel(
                f"the plan's schedules are for {policy.parts} equal parts of the batch, and the model was called with a batch "
                f"of {rows * policy.parts + left}: call it with guidance in the batch, or calibrate without apart=True"
            )
        try:
            self.run("full", stages.keeping_rows(rows), self.full)
        except PassError as error:
            if not isinstance(error.__cause__, NoRule):
                raise
            raise UnsupportedModel(
                "the plan computes parts of the batch at steps of their own, and the rows of this model's batch are not known "
                f"to be independent: followed as tokens are, they end at {error.__cause__}. Calibrate without apart=True"
            ) from error

    def steps(self, structure: Structure, policy: Policy) -> StepGraphs:
        """The step graphs of a policy that goes by branches."""
        config = self.config
        grid = token_grid(structure, config)
        plans, fallbacks = resolve(self.normal, structure, policy.steps(structure))
        sampler = make_sampler(structure, config, grid, plans)
        kept = recordings(plans)
        self.run("full", stages.recording(structure, kept, self.dtype), self.full)
        self.kinds, self.cached = len(plans), [copy_graph(self.normal) for _ in plans]
        for (name, gm), plan in zip(self.named(), plans, strict=True):
            passes = stages.rewriting(structure, plan, grid, sampler.count if sampler else 0, self.dtype)
            collapsing = stages.COLLAPSING if config.form == "collapsed" else ()
            self.run(name, passes + collapsing, gm)
        if config.form == "collapsed":
            families = [
                tuple(feature_slots(structure, recording.branch, update, recording.terms))
                for recording in kept
                for update in recording.branch.updates
            ]
            merges = () if "merge_caches" in config.disable_passes else find_merges(self.cached, families)
            self.run_on_all("merge", stages.merging(merges))
            self.run_on_all("state", stages.shrinking(state_read(self.full, self.cached)))
        if config.timelines:
            tables = {name: shape[1:] for name, shape in config.timelines[0].shapes.items() if "@" not in name}
            for name, gm in self.named():
                self.run(f"{name}_plan", stages.weighing(tables), gm)
        if config.state_dtype is torch.int8:
            self.run_on_all("int8", stages.QUANTIZING)
        self.run_on_all("finish", stages.FINISHING)
        return StepGraphs(
            self.normal, structure, plans, kept, fallbacks, self.full, tuple(self.cached), sampler, tuple(self.records)
        )
