"""Toy transformers without Dynamo, plans made by hand, and step graphs run with state that a test can look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from hero_fx.passes.analysis.branches import find_branches
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.emit import value_of
from hero_fx.passes.normalize.functionalize import Functionalize
from hero_fx.passes.normalize.identities import DropIdentities
from hero_fx.passes.rewrite.extrapolate import ExtrapolateBranches, ReuseBranches
from hero_fx.passes.rewrite.plan import StepPlan, Strategy, recordings
from hero_fx.passes.rewrite.record import RecordFeatures
from hero_fx.passes.rewrite.refresh import RefreshBranches
from hero_fx.passes.rewrite.refresh_scored import RefreshScored
from hero_fx.passes.rewrite.resolve import resolve
from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.passes.slots import IndexSlot, ScalarSlot, TableSlot, slots_of
from hero_fx.step_graphs import copy_graph

from .tracing import outputs, run_passes, trace

WIDTH, GRID, IMAGE, TEXT, BATCH = 4, (1, 2, 3), 6, 2, 2


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def ffns(x: Tensor, gate: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Two gated FFNs, the least there is: x [B, IMAGE, WIDTH], gate [B, 1, WIDTH], weights [WIDTH, WIDTH]."""
    x = x + gate * F.linear(norm(x), w)
    return x + gate * F.linear(norm(x), v)


def attentions(x: Tensor, gate: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The same with attention of one head in the place of the FFNs."""
    for weight in (w, v):
        n = norm(x).unsqueeze(1)
        x = x + gate * F.linear(F.scaled_dot_product_attention(n, n, n).squeeze(1), weight)
    return x


def joint(x: Tensor, gate: Tensor, w: Tensor, v: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Joint attention and a joint FFN on image and text [B, TEXT, WIDTH], twice, as in CogVideoX."""
    for weight in (w, v):
        n = norm(torch.cat([text, x], 1)).unsqueeze(1)
        out = F.linear(F.scaled_dot_product_attention(n, n * 2, n).squeeze(1), weight)
        x, text = x + gate * out[:, TEXT:], text + gate * out[:, :TEXT]
        out = F.gelu(F.linear(norm(torch.cat([text, x], 1)), weight))
        x, text = x + gate * out[:, TEXT:], text + gate * out[:, :TEXT]
    return x, text


@dataclass
class Toy:
    """A model, its structure, and one lane of feature state, by the names of its tensors."""

    function: Callable[..., Any]
    text: bool = False
    width: int = WIDTH
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.normal = trace(self.function, *self.inputs())
        run_passes(self.normal, Functionalize(), DropIdentities(), DropDeadCode())
        self.structure: Structure = find_branches(self.normal)

    def inputs(self, seed: int = 0) -> list[Tensor]:
        """Image tokens, gate, two weights that do not depend on the seed, and text tokens if there are any."""
        streams = [numbers(BATCH, n, self.width, seed=seed + i) for i, n in enumerate((IMAGE, 1, TEXT))]
        weights = [numbers(self.width, self.width, seed=1000 + i) for i in range(2)]
        return [*streams[:2], *weights, *streams[2 : 2 + self.text]]

    def plan(self, *strategies: Strategy) -> StepPlan:
        """One strategy for each branch; the last one for the rest."""
        more = strategies[-1:] * (len(self.structure.branches) - len(strategies))
        wanted = tuple(zip(self.structure.branches, (*strategies, *more), strict=True))
        ((plan,), fallbacks) = resolve(self.normal, self.structure, [wanted])
        assert not fallbacks
        return plan

    def full(self, *plans: StepPlan, dtype: torch.dtype | None = None) -> fx.GraphModule:
        """The full step that records what the plans read."""
        gm = copy_graph(self.normal)
        run_passes(gm, RecordFeatures(structure=self.structure, recordings=recordings(plans), state_dtype=dtype))
        return gm

    def cached(self, plan: StepPlan, *, count: int = 2, dtype: torch.dtype | None = None) -> fx.GraphModule:
        """The cached step of a plan, all passes in order."""
        gm, common = copy_graph(self.normal), {"structure": self.structure, "plan": plan, "state_dtype": dtype}
        options: Any = common
        run_passes(
            gm,
            RefreshBranches(count=count, **options),
            RefreshScored(grid=GRID, **options),
            ExtrapolateBranches(**options),
            ReuseBranches(**options),
            DropDeadCode(),
        )
        return gm

    def run(
        self, gm: fx.GraphModule, inputs: list[Tensor], *, index: Tensor | None = None, **scalars: float
    ) -> list[Tensor]:
        """Runs a step graph; its state starts as zeros and lives on in `self.state`."""
        extra: list[Tensor] = []
        for node, slot in slots_of(gm):
            like = value_of(node)
            match slot:
                case ScalarSlot():
                    extra.append(torch.tensor(scalars[slot.name]))
                case IndexSlot():
                    assert index is not None
                    extra.append(index)
                case TableSlot():
                    raise AssertionError("plans have tests of their own")
                case _:
                    extra.append(self.state.setdefault(slot.name, torch.zeros(like.shape, dtype=like.dtype)))
        with torch.no_grad():
            return outputs(gm(*inputs, *extra))
