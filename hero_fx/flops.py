"""Floating-point operations of a graph, counted from its nodes, and how many of them lie outside of any branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import fx

from hero_fx.passes.analysis.branch_names import module_path
from hero_fx.passes.analysis.branch_tokens import body_of
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.analysis.tokens import is_matmul
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.compat import count_flops
from hero_fx.passes.emit import by_name, value_of
from hero_fx.passes.ops import PRODUCTS

from .config import Config
from .policy import Policy
from .schedule import Schedule
from .step_graphs import StepGraphs
from .timeline import Timeline

__all__ = ["Flops", "Outside", "flops", "flops_by", "outside", "step_kinds", "too_much_outside", "trajectory_flops"]


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations (a multiply-add is two)."""

    gemm: int
    """Matrix products and convolutions, as the paper counts."""
    attention: int
    """Q K^T and P V, inside attention ops or written out as products of two batches of matrices."""

    @property
    def total(self) -> int:
        """Both, which is what hardware feels."""
        return self.gemm + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.gemm + other.gemm, self.attention + other.attention)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.gemm * times, self.attention * times)


def flops(gm: fx.GraphModule) -> Flops:
    """FLOPs of one run of a normalised or rewritten graph, counted from its nodes under fake tensors."""
    known: _Known = {}
    return _sum(_of_node(node, known) for node in gm.graph.nodes)


def _sum(parts: Iterable[Flops]) -> Flops:
    total = Flops(0, 0)
    for part in parts:
        total += part
    return total


_Known = dict[tuple[object, str], Any]
"""Counts of products, by op and by the shapes of what it takes: the layers of a model have the same."""


def _of_node(node: fx.Node, known: _Known) -> Flops:
    if node.target in ATTENTION:
        op = ATTENTION[node.target]
        query, key, value = map(value_of, op.operands(node))
        # [.., L, E] x [.., S, E] -> [.., L, S], then x [.., S, V]
        return Flops(0, 2 * prod(query.shape[:-1]) * key.shape[op.dim] * (query.shape[-1] + value.shape[-1]))
    if not is_matmul(node):
        return Flops(0, 0)
    key = (node.target, repr(fx.map_arg((node.args, node.kwargs), _shape)))
    if key not in known:
        known[key] = _count(node)
    count = known[key]
    # A product of two batches of matrices has no weights in it: attention written out, or ToCa's attention map.
    if all(value_of(source).dim() > 2 for source in node.all_input_nodes) and node.target in PRODUCTS:
        return Flops(0, count)
    return Flops(count, 0)


def _shape(node: fx.Node) -> Any:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


def _count(node: fx.Node) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    mode = next(v.fake_mode for v in map(value_of, node.all_input_nodes))
    with mode, torch.no_grad(), count_flops() as counter:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return counter.get_total_flops()


@dataclass(frozen=True, slots=True)
class Outside:
    """What a model computes outside of any branch, at every step: embeddings, modulation, refiners, the head."""

    share: float | None
    """Of a full step's FLOPs, attention included; None where sizes, and so FLOPs, depend on the inputs' values."""
    modules: tuple[str, ...]
    """Where most of it is done, the most first; empty names are left out."""


def outside(normal: fx.GraphModule, structure: Structure) -> Outside:
    """What lies outside of any branch of a normalised graph."""
    nodes = by_name(normal)
    inside = {node for branch in structure.branches for node in body_of(nodes, branch, to_update=True)[1]}
    total: Counter[bool] = Counter()
    modules: Counter[str] = Counter()
    known: _Known = {}
    for node in normal.graph.nodes:
        count: Any = _of_node(node, known).total
        if not isinstance(count, int):
            return Outside(None, ())
        total[node in inside] += count
        if count and node not in inside:
            modules[module_path([node])] += count
    most = tuple(name for name, _ in modules.most_common(3) if name)
    return Outside(total[False] / max(1, total.total()), most)


_MUCH = 0.1


def too_much_outside(normal: fx.GraphModule, structure: Structure) -> str | None:
    """A sentence on what lies outside of any branch, where that is more than a tenth of a full step's FLOPs."""
    found = outside(normal, structure)
    if found.share is None or found.share <= _MUCH:
        return None
    where = f", most of them in {', '.join(found.modules)}" if found.modules else ""
    return (
        f"{found.share:.0%} of a full step's FLOPs (attention included) lie outside of any branch and are computed at every "
        f"step{where}. In a model of usual size that means that updates of the residual stream were not found: they are "
        "x + f(x) or x + gate * f(x) of hidden states [batch, tokens, width], with f a layer's attention or FFN"
    )


StepKind = int | Literal["part"] | None
"""None for a full step, `"part"` for one that is full for a part of the batch, else the number of the kind of cached step."""


def step_kinds(config: Config, policy: Policy, num_steps: int) -> list[StepKind]:
    """What each step of a trajectory runs: None for a full step, else the number of its cached kind; `"part"` where parts of
    the batch have full steps of their own, and some of them are full.

    Raises:
        ValueError: a plan is not for so many steps.
    """
    schedule = config.schedule_of(None if config.plan is None else num_steps)
    kinds: list[StepKind] = [*_kinds(schedule, policy, num_steps)]
    for part in schedule.parts if isinstance(schedule, Timeline) else ():
        kinds = ["part" if kind is None and not full else kind for kind, full in zip(kinds, part, strict=True)]
    return kinds


def _kinds(schedule: Schedule, policy: Policy, num_steps: int) -> list[int | None]:
    kinds: list[int | None] = []
    last = 0
    for step in range(num_steps):
        if schedule.is_full(step):
            kinds.append(None)
            last = step
        else:
            kinds.append(policy.kind(step - last))
    return kinds


def trajectory_flops(steps: StepGraphs, config: Config, num_steps: int) -> Flops:
    """FLOPs of a whole trajectory of `num_steps` calls."""
    return flops_by(config.schedule_of(None if config.plan is None else num_steps), steps, config, num_steps)


def flops_by(schedule: Schedule, steps: StepGraphs, config: Config, num_steps: int) -> Flops:
    """FLOPs of a trajectory by another schedule than that of the options."""
    policy = config.make_policy()
    assert policy is not None
    count = Counter(_kinds(schedule, policy, num_steps))
    if steps.parts > 1:  # each runs the step graphs by a schedule of its own
        assert isinstance(schedule, Timeline)
        fulls = sum(schedule.levels)
        count = Counter({None: fulls, 0: steps.parts * num_steps - fulls})
    total = flops(steps.full) * count[None]
    for number, gm in enumerate(steps.cached):
        total += flops(gm) * count[number]
    return total
