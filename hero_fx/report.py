"""Looking inside: what was found in a model, what each step kind does, what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from hero_fx.passes.pipeline import PassRecord
from hero_fx.passes.rewrite.plan import Extrapolate, Full, Refresh, Reuse, ScoredRefresh, Strategy

from . import dynamo
from .backends import Backend
from .backends import backend as make_backend
from .config import Config
from .flops import flops, flops_by, outside, too_much_outside
from .schedule import Schedule
from .step_graphs import StepGraphs
from .timeline import Timeline
from .tracing import trace

__all__ = ["Explanation", "explain"]


def explain(
    model_or_backend: Callable[..., Any] | Backend, *args: Any, backend: Backend | None = None, **kwargs: Any
) -> Explanation:
    """What was found in a model, what each step kind does per layer, FLOPs and bytes; print it to read it.

    Args:
        model_or_backend: a backend after its first call (explains the graph compiled last), or a model; a model is
            traced with `args` and `kwargs`, the arguments of one call, but not compiled or run.
        backend: for a model: the options; None: the backend it was compiled with, or the defaults.

    Raises:
        ValueError: a backend that has compiled nothing, or a model that cannot be accelerated.
    """
    if isinstance(model_or_backend, Backend):
        if model_or_backend.config.policy == "full":
            raise ValueError("policy='full' rewrites nothing: there is nothing to explain")
        if not model_or_backend.graphs:
            raise ValueError(
                "this backend has compiled nothing yet: call the compiled model once, or explain the model"
            )
        return Explanation(model_or_backend.graphs[-1], model_or_backend.config)
    chosen = backend or dynamo.backend_of(model_or_backend, Backend) or make_backend()
    return Explanation(trace(model_or_backend, *args, backend=chosen, **kwargs), chosen.config)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer of `explain`; `str` of it is the report."""

    steps: StepGraphs
    config: Config

    def __str__(self) -> str:
        return f"{self.findings}\n\n{self.passes}"

    @property
    def findings(self) -> str:
        """What was found in the model, what each step kind does, what it costs."""
        plan = "" if self.config.plan is None else str(self.config.plan)
        parts = (self._found(), self._layers(), plan, self._cost(), self._state(), self._notes())
        return "\n\n".join(part for part in parts if part)

    @property
    def passes(self) -> str:
        """What each pass did to each graph: sites rewritten, nodes added or removed, milliseconds."""
        rows: dict[tuple[str, str], list[PassRecord]] = {}
        for record in self.steps.records:
            rows.setdefault((record.pipeline.partition("_")[0], record.name), []).append(record)
        shown = []
        for names, records in rows.items():
            if sites := sum(r.sites for r in records):
                nodes, seconds = sum(r.nodes_after - r.nodes_before for r in records), sum(r.seconds for r in records)
                shown.append([*names, str(sites), f"{nodes:+d}", f"{1000 * seconds:.1f}"])
        idle = sorted({name for _, name in rows} - {row[1] for row in shown})
        table = tabulate(
            shown,
            headers=["graph", "pass", "sites", "nodes", "ms"],
            disable_numparse=True,
            colalign=("left", "left", "right", "right", "right"),
        )
        return f"{table}\nnothing to do: {', '.join(idle)}" if idle else table

    def _found(self) -> str:
        structure, steps = self.steps.structure, self.steps
        streams = ", ".join(
            f"{s.name} [{' + '.join(f'{g.length} {g.source}' for g in s.tokens.segments)} tokens x {s.width}]"
            for s in structure.streams
        )
        kinds = Counter(branch.kind for branch in structure.branches)
        lines = [
            f"{structure.depth} layers, {len(structure.branches)} branches: "
            + ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
            f"residual streams: {streams}",
            f"token grid (frames, height, width): {self.config.grid or structure.grid or 'not read from the graph'}",
        ]
        share = outside(steps.normal, structure).share
        if share is not None:
            lines.append(f"outside of any branch, computed at every step: {share:.1%} of a full step's FLOPs")
        if steps.sampler is not None:
            sampler = steps.sampler
            lines.append(
                f"a cached step refreshes {sampler.count} of {structure.image_tokens} image tokens, sampled in patches of "
                f"{sampler.patch}; no token waits longer than {sampler.max_age} cached steps in a row"
                if sampler.max_age is not None
                else f"a cached step refreshes {sampler.count} of {structure.image_tokens} image tokens, sampled in patches "
                f"of {sampler.patch}"
            )
        return "\n".join(lines)

    def _layers(self) -> str:
        """One row per run of layers that are treated alike."""
        rows: list[list[str]] = []
        plans = self.steps.plans
        if not plans:
            return "a cached step runs no layer: it forecasts the outputs"
        for number, (branch, _) in enumerate(plans[0]):
            what = [describe(plan[number][1], self.steps) for plan in plans]
            streams = "+".join(self.steps.structure.streams[u.stream].name for u in branch.updates)
            rows.append([str(branch.layer), branch.kind, streams, branch.module, *what])
        headers = ["layers", "branch", "updates", "first module", *_kind_names(len(plans))]
        return tabulate(_merge(rows), headers=headers, disable_numparse=True)

    def _cost(self) -> str:
        # ToCa's scores are extra work of full steps; without them both are equal.
        parts = self.steps.parts
        plain, full = flops(self.steps.normal), flops(self.steps.full) * parts
        rows: list[list[Any]] = [["full step", full.gemm / 1e9, full.total / 1e9, full.total / plain.total]]
        if parts > 1:
            rows.append([f"full for one of {parts} parts of the batch", *(value / parts for value in rows[0][1:])])
        for name, gm in zip(_kind_names(len(self.steps.cached)), self.steps.cached, strict=True):
            cost = flops(gm) * parts
            rows.append([name, cost.gemm / 1e9, cost.total / 1e9, cost.total / plain.total])
        for schedule in self._schedules():
            assert schedule.num_steps is not None
            total = flops_by(schedule, self.steps, self.config, schedule.num_steps)
            fulls = sum(map(schedule.is_full, range(schedule.num_steps)))
            counted = schedule.counted if isinstance(schedule, Timeline) else fulls
            rows.append(
                [
                    f"{schedule.num_steps} steps, {counted} full",
                    total.gemm / 1e9,
                    total.total / 1e9,
                    total.total / (plain.total * schedule.num_steps),
                ]
            )
        known = [
            [v if isinstance(v, (str, int, float)) else "varies" for v in row] for row in rows
        ]  # by the inputs' values
        return tabulate(known, headers=["GFLOPs", "GEMM + conv", "with attention", "of full compute"], floatfmt=",.3f")

    def _schedules(self) -> list[Schedule]:
        """Those of known length; of a plan, one for each number of steps and of full steps."""
        if self.config.plan is not None:
            return list({(t.num_steps, t.counted): t for t in self.config.timelines}.values())
        return [] if self.config.num_steps is None else [self.config.make_schedule()]

    def _state(self) -> str:
        roles: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for spec in self.steps.state:
            roles[spec.slot.role] += spec.nbytes
            counts[spec.slot.role] += 1
        rows = [[role, counts[role], size / 1e6] for role, size in roles.items()]
        rows.append(["feature state per lane and session", len(self.steps.state), self.steps.state_bytes / 1e6])
        return tabulate(rows, headers=["state", "tensors", "MB"], floatfmt=",.3f")

    def _notes(self) -> str:
        notes = [f"{f.branch} is computed in full at every step: {f.reason}" for f in self.steps.fallbacks]
        much = too_much_outside(self.steps.normal, self.steps.structure)
        if much is not None:
            notes.append(much)
        if steps_without_grid(self.steps, self.config):
            notes.append(
                f"the token grid was not found in the graph, so patches are runs of tokens in a row; pass grid=(frames, "
                f"height, width) in tokens, {self.steps.structure.image_tokens} in all"
            )
        if (
            self.config.plan is None
            and self.config.num_steps is None
            and self.config.cooldown
            and self.config.schedule == "uniform"
        ):
            notes.append(
                f"num_steps is not given, so the end of a trajectory is not known and cooldown={self.config.cooldown} forces "
                "no full step"
            )
        return "\n".join(f"note: {note}" for note in notes)


def describe(strategy: Strategy, steps: StepGraphs) -> str:
    """A strategy in a few words."""
    match strategy:
        case Full():
            return "compute"
        case Reuse(cache_point=point):
            return f"reuse ({point})"
        case Extrapolate(order=order, cache_point=point):
            return f"extrapolate, order {order} ({point})"
        case Refresh():
            count = steps.sampler.count if steps.sampler else 0
            return (
                f"refresh {count} tokens, keys {strategy.keys}, text {strategy.text}, others {strategy.unsampled} "
                f"({strategy.cache_point})"
            )
        case ScoredRefresh():
            return f"refresh the best {strategy.ratio:.0%} by {strategy.score}, text {strategy.text} ({strategy.cache_point})"


def steps_without_grid(steps: StepGraphs, config: Config) -> bool:
    """True where tokens are refreshed on a grid that neither the graph nor the options give."""
    refreshes = any(isinstance(s, (Refresh, ScoredRefresh)) for plan in steps.plans for _, s in plan)
    return refreshes and config.grid is None and steps.structure.grid is None


def _kind_names(count: int) -> list[str]:
    return ["cached step"] if count == 1 else [f"cached step, kind {i}" for i in range(count)]


def _merge(rows: list[list[str]]) -> list[list[str]]:
    """Folds the rows of equal layers: layer numbers become ranges like `0-20`."""
    layers: dict[str, list[list[str]]] = {}
    for row in rows:
        layers.setdefault(row[0], []).append(row)
    merged: list[tuple[int, int, list[list[str]]]] = []
    for layer, group in layers.items():
        shape = [[*row[1:3], *row[4:]] for row in group]
        if merged and [[*row[1:3], *row[4:]] for row in merged[-1][2]] == shape:
            merged[-1] = (merged[-1][0], int(layer), merged[-1][2])
        else:
            merged.append((int(layer), int(layer), group))
    return [
        [str(first) if first == last else f"{first}-{last}", *row[1:]] for first, last, group in merged for row in group
    ]
