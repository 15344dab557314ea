"""Cached steps, deep layers: features are estimated, neither attention nor FFN runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.structure import Branch, Structure
from hero_fx.passes.emit import Emitter, by_name, value_of

from .features import cached_node, feature_slots, taylor
from .plan import CachePoint, Extrapolate, Reuse, StepPlan

__all__ = ["ExtrapolateBranches", "ReuseBranches"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrapolateBranches:
    """Replaces a branch's features by their linear (or order-n) extrapolation from the last full steps (Eq. 6).

    Before::

        linear = aten.linear.default(norm, weight)  # norm, attention, ... read x
        mul = aten.mul.Tensor(gate, linear)
        add = aten.add.Tensor(x, mul)

    After (pre-gate; dead code is removed by a later pass)::

        mul_1 = aten.mul.Tensor(y1, x)  # y1 = (F - F_prev) / d, x steps since the last full one
        add_1 = aten.add.Tensor(y0, mul_1)
        mul = aten.mul.Tensor(gate, add_1)
        add = aten.add.Tensor(x, mul)

    Legal by the policy's word only: this changes numerics. What is exact is that all readers of the feature see the
    same estimate, and that the residual stream itself is carried on unchanged.
    """

    structure: Structure
    plan: StepPlan
    state_dtype: torch.dtype | None = None
    name: str = "extrapolate"

    def apply(self, gm: fx.GraphModule) -> int:
        sites = tuple((b, s.order, s.cache_point) for b, s in self.plan if isinstance(s, Extrapolate))
        return _replace(gm, self.structure, sites, self.state_dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseBranches:
    """Replaces a branch's features by those of the last full step (FORA, and ToCa's attention).

    Before::

        linear = aten.linear.default(norm, weight)
        add = aten.add.Tensor(x, linear)

    After::

        add = aten.add.Tensor(x, y0)

    Legal by the policy's word only, as for `ExtrapolateBranches`, of which this is order 0.
    """

    structure: Structure
    plan: StepPlan
    state_dtype: torch.dtype | None = None
    name: str = "reuse"

    def apply(self, gm: fx.GraphModule) -> int:
        sites = tuple((b, 0, s.cache_point) for b, s in self.plan if isinstance(s, Reuse))
        return _replace(gm, self.structure, sites, self.state_dtype)


def _replace(
    gm: fx.GraphModule,
    structure: Structure,
    sites: Iterable[tuple[Branch, int, CachePoint]],
    dtype: torch.dtype | None,
) -> int:
    """Puts the estimate of an order in the place of each branch's features."""
    emitter, nodes = Emitter(gm), by_name(gm)
    count = 0
    for branch, order, cache_point in sites:
        for update in branch.updates:
            feature = cached_node(nodes, update, cache_point)
            slots = feature_slots(structure, branch, update, order + 1)
            with emitter.before(feature):
                estimate, _ = taylor(emitter, slots, value_of(feature), dtype)
            feature.replace_all_uses_with(estimate)
            count += 1
    return count
