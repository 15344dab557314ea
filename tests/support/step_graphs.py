"""Small graphs with feature state, made of plain functions, and what a pass does to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hero_fx.passes.pipeline import Pass, Pipeline
from hero_fx.passes.render import graph_diff, render
from hero_fx.passes.slots import FeatureSlot, IndexSlot, ScalarSlot

B, N, D, K = 2, 5, 3, 2


def graph(function: Any, **inputs: Tensor) -> GraphModule:
    """`function` as a normalised graph; inputs named s* are feature state, w* scalars, idx* selections."""
    gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs.values())
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node._rename(name)
        node.target = name
        if name.startswith("s"):
            node.meta["slot"] = FeatureSlot(name, "image")
        if name.startswith("w"):
            node.meta["slot"] = ScalarSlot("power", int(name[1:] or 1))
        if name.startswith("idx"):
            node.meta["slot"] = IndexSlot(None if name == "idx" else int(name[3:]))
    gm.recompile()
    return gm


def run(gm: GraphModule, *passes: Pass) -> tuple[int, str]:
    before = render(gm)
    records = Pipeline(label="test", passes=passes)(gm)
    return sum(r.sites for r in records), graph_diff(before, gm, context=0)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = {"x": (B, N, D), "s1": (B, N, D), "v": (B, K, D), "gate": (B, 1, D)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    return {"x": values["x"], "s1": values["s1"], "v": values["v"], "gate": values["gate"], "idx": torch.tensor([1, 4])}


def outputs(gm: GraphModule, inputs: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    """(result, inputs afterwards): passes must keep both."""
    copies = [t.clone() for t in inputs.values()]
    return gm(*copies), copies


def assert_same(before: GraphModule, after: GraphModule, inputs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(outputs(after, inputs), outputs(before, inputs), rtol=1e-6, atol=1e-6)


def block(x: Tensor, s1: Tensor, v: Tensor, gate: Tensor, idx: Tensor) -> Tensor:
    """A refreshed branch and the next branch's gather."""
    merged = torch.index_copy(s1, 1, idx, v)
    out = x + gate * merged
    s1.copy_(merged)
    return torch.index_select(out, 1, idx) * 2, out  # type: ignore[return-value]


def must_not_fire(function: Any, one: Pass, **inputs: Tensor) -> None:
    sites, diff = run(graph(function, **inputs), one)
    assert (sites, diff) == (0, "")
