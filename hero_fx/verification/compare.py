"""How far two runs are apart, how far rounding allows them to be, and in which dtypes graphs compute (autocast included)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hero_fx.passes import compat
from hero_fx.passes.analysis.tokens import is_matmul
from hero_fx.passes.emit import fake_mode_of, value_of
from hero_fx.step_graphs import StepGraphs

__all__ = ["Outputs", "strange_products", "tolerance", "worst"]

Outputs = Sequence[Sequence[Tensor]]
"""Of each call, the tensors that the model returned."""

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_COARSE = 5e-2
"""Feature state of 8 bits holds four to eight of them; TF32 products ten, but of every product in a row."""


def tolerance(steps: StepGraphs) -> float:
    """What rounding may do to an output, relative to its largest value: by the coarsest dtype of the model and its state.

    Rewriting changes the order of sums, and which results a fused kernel rounds; each costs some units in the last place,
    and layers carry them on.
    """
    dtype = _coarsest(steps)
    on_gpu = any(v.is_cuda for node in steps.normal.graph.nodes for v in compat.tensors_in(node.meta.get("val")))
    if dtype is torch.float32 and on_gpu and torch.get_float32_matmul_precision() != "highest":
        return _COARSE
    return _TOLERANCE.get(dtype, _COARSE)


def worst(ours: Outputs, theirs: Outputs) -> float:
    """The largest of |a - b| / max |b|; infinity where shapes, dtypes or what is finite differ."""
    pairs = [pair for row, other in zip(ours, theirs, strict=True) for pair in zip(row, other, strict=True)]
    return max((_distance(a, b) for a, b in pairs), default=0.0)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = a.double(), b.double()
    unlike = ~((a == b) | (a.isnan() & b.isnan()))
    if not bool(unlike.any()):
        return 0.0
    finite = b[b.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    error = float((a - b)[unlike].abs().max())
    return error / largest if largest and error == error else float("inf")


def _coarsest(steps: StepGraphs) -> torch.dtype:
    """The coarsest dtype that anything of the model or of its feature state has."""
    dtypes = {spec.dtype for spec in steps.state if spec.dtype.is_floating_point or spec.dtype is torch.int8}
    return max(dtypes | _run(steps.normal).dtypes, key=_coarseness, default=torch.float32)


def _coarseness(dtype: torch.dtype) -> float:
    return 1.0 if dtype is torch.int8 else torch.finfo(dtype).eps


class _Dtypes(fx.Interpreter):
    """Runs a graph under fake tensors, autocast and all, and notes in which dtypes; of products by the weights they take."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.products: dict[tuple[str, ...], set[torch.dtype]] = {}
        self.dtypes: set[torch.dtype] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        dtypes = {value.dtype for value in compat.tensors_in(result) if value.is_floating_point()}
        self.dtypes |= dtypes
        if is_matmul(n):
            self.products.setdefault((str(n.target), *_weights(n)), set()).update(dtypes)
        return result


def _weights(node: fx.Node) -> list[str]:
    """Names of the parameters that a product takes as they are, or cast, transposed or cut."""
    names = []
    for source in node.all_input_nodes:
        while source.op != "placeholder" and len(source.all_input_nodes) == 1:
            (source,) = source.all_input_nodes
        if source.op == "placeholder" and not source.meta.get("model_input") and "slot" not in source.meta:
            names.append(source.name)
    return names


def _run(gm: fx.GraphModule) -> _Dtypes:
    mode = fake_mode_of(gm)
    run = _Dtypes(gm)
    with mode, torch.no_grad(), compat.unbound_sizes(mode), compat.autocast_kept():
        run.run(*[value_of(node) for node in gm.graph.find_nodes(op="placeholder")])
    return run


def strange_products(normal: fx.GraphModule, cached: Sequence[fx.GraphModule]) -> list[str]:
    """The products of cached steps that run in a dtype in which the model does not run the product with those weights."""
    known = _run(normal).products
    strange: list[str] = []
    for gm in cached:
        for key, dtypes in _run(gm).products.items():
            strange += [f"{' '.join(key)} in {dtype}" for dtype in dtypes - known.get(key, dtypes)]
    return strange
