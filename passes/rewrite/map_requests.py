"""The step graph of one request, for several requests at once.

`torch.vmap` runs the graph of one request over an axis of requests, and is traced here into a graph of its own. Requests
cannot mix in it, whatever the ops are: vmap is defined as running the function once for each, and an op it cannot run so
is an error. So nothing has to be known of where the batch of a model lies, or of how its rows act on each other.

Before, for one request of a batch of its own [g]::

    x: f32[g, 6, 4] = input
    idx: i64[2] = input  # its sampled tokens
    index_select = aten.index_select.default(x, 1, idx)

After, for R requests, each with sampled tokens of its own::

    x: f32[R, g, 6, 4] = input
    idx: i64[R, 2] = input
    gather = aten.gather.default(x, 2, ...)

What is said here of a few ops only spares vmap the loop over requests that it falls back to, or keeps the op whole: a linear
layer and attention take the axis of requests as a part of their batch, as they would in a batch of the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from hero_fx.passes import compat
from hero_fx.passes.emit import value_of

__all__ = ["map_requests"]

aten = torch.ops.aten


def map_requests(gm: fx.GraphModule, mapped: Sequence[bool], count: int) -> fx.GraphModule:
    """The graph of `count` requests, with the same inputs in the same order.

    Args:
        gm: the step graph of one request.
        mapped: for each of its inputs whether each request has its own, along a new first axis; the others are shared.
        count: requests, R. Every output has them along a new first axis.

    Raises:
        RuntimeError: an op that cannot run for each request by itself: it draws random numbers, or writes to what is shared.
    """
    mode = compat.new_fake_mode()
    inputs = gm.graph.find_nodes(op="placeholder")
    with mode, torch.inference_mode(False), torch.no_grad(), compat.lazy_code():
        fakes = [
            _repeated(value_of(node), count) if own else compat.to_fake(mode, value_of(node))
            for node, own in zip(inputs, mapped, strict=True)
        ]
        dims = tuple(0 if own else None for own in mapped)
        traced = make_fx(torch.vmap(_OneRequest(gm).run, in_dims=dims, randomness="error"))(*fakes)
    for old, new, fake in zip(inputs, traced.graph.find_nodes(op="placeholder"), fakes, strict=True):
        compat.rename(new, old.name)
        new.target = new.name
        new.meta["val"] = fake
        new.meta |= {key: old.meta[key] for key in ("slot", "argument", "model_input") if key in old.meta}
    traced.recompile()
    return traced


def _repeated(value: Tensor, count: int) -> Tensor:
    return torch.empty((count, *value.shape), dtype=value.dtype, device=value.device)


class _OneRequest(fx.Interpreter):
    """Runs a graph, some ops in the form that vmap has a rule for."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _FORMS.get(target, target)(*args, **kwargs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return aten.linear.default(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        if dims[0] is None or dims[1] is not None or dims[2] is not None:
            return torch.vmap(aten.linear.default, in_dims=dims[:3])(x, weight, bias), 0
        x = x.movedim(dims[0], 0)
        if x.dim() < 3:
            return aten.linear.default(x, weight, bias), 0
        return aten.linear.default(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2]), 0


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Any:
        return aten.scaled_dot_product_attention.default(q, k, v, mask, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        count, (*tensors, mask, options) = info.batch_size, inputs
        q, k, v = (_in_front(x, dim, count) for x, dim in zip(tensors, dims[:3], strict=True))
        if mask is not None:
            mask = mask if dims[3] is None else mask.movedim(dims[3], 0)
            leading = (count,) if dims[3] is not None else (1,)
            own = mask.shape[1:] if dims[3] is not None else mask.shape
            mask = mask.reshape(*leading, *(1,) * (q.dim() - 1 - len(own)), *own)
        if q.dim() < 4:
            return aten.scaled_dot_product_attention.default(q, k, v, mask, **options), 0
        if mask is not None:
            mask = mask.expand(*q.shape[:2], *mask.shape[2:]).flatten(0, 1)
        q, k, v, size = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), q.shape[:2]
        return aten.scaled_dot_product_attention.default(q, k, v, mask, **options).unflatten(0, size), 0


class _SliceScatter(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, source: Tensor, dim: int, part: Any) -> Any:
        return aten.slice_scatter.default(x, source, dim, *part)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, source: Tensor, dim: int, part: Any) -> tuple[Tensor, int]:
        x, source = (_in_front(t, own, info.batch_size) for t, own in ((x, dims[0]), (source, dims[1])))
        return aten.slice_scatter.default(x, source, dim + 1, *part), 0


def _in_front(x: Tensor, dim: int | None, count: int) -> Tensor:
    return x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _apply(_Linear, x, weight, bias)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    return _apply(_Attention, q, k, v, attn_mask, {"dropout_p": dropout_p, "is_causal": is_causal, **options})


def _index_copy_(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """In place along one axis, as `index_put_`, for which vmap has a rule. It is right where that axis comes first (2.13)."""
    aten.index_put_.default(x.transpose(0, dim), [index], source.transpose(0, dim))
    return x


def _slice_scatter(x: Tensor, source: Tensor, dim: int = 0, *part: Any) -> Any:
    return _apply(_SliceScatter, x, source, dim % x.dim(), part)


_FORMS: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.scaled_dot_product_attention.default: _attention,
    aten.index_copy_.default: _index_copy_,
    aten.slice_scatter.default: _slice_scatter,
}
