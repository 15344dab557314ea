"""What the passes know about ops: sets of ops that are alike, arguments by name, and what a call writes to.

A set holds overloads, as they stand in `node.target`, so that a test is `node.target in CASTS`. It holds every overload of
the ops it names but those that write to an argument (`out=`); in-place ops (`add_`) are ops of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from .compat import FUNCTIONAL_COLLECTIVES, HigherOrderOperator, OpOverload, schema_of

__all__ = [
    "CASTS", "COLLECTIVES", "EXCHANGES", "LOOKUPS", "MATMULS", "POINTWISE", "PRODUCTS", "PROJECTIONS", "RESHAPES",
    "SAME_VALUES", "SHAPE_ONLY", "SILENT_VIEWS", "SPLITS", "UNIT_AXES", "WAITS", "argument", "arguments_of", "dim_of",
    "first_input", "has_side_effect", "int_argument", "ints_argument", "is_functional", "is_in_place", "is_operator",
    "node_argument", "nodes_argument", "nodes_in", "out_of_place", "overloads", "shown_by", "with_arguments", "writes",
]  # fmt: skip

aten = torch.ops.aten
Ops = frozenset[Any]


def overloads(*names: str, of: Any = aten) -> Ops:
    """The overloads of these ops (of aten) that write to none of their arguments; an op that this torch lacks has none."""
    packets = [getattr(of, name) for name in names if hasattr(of, name)]
    found = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    return frozenset(op for op in found if not schema_of(op).is_mutable)


CASTS = overloads("to", "_to_copy", "type_as")
"""Give their first argument in another dtype, on another device or in another layout; it itself if nothing changes."""

SAME_VALUES = CASTS | overloads("clone", "contiguous", "detach", "alias", "dropout")
"""Give the values of their first argument, up to the rounding of a cast (`dropout` does so outside of training)."""

RESHAPES = overloads("reshape", "view", "_unsafe_view", "flatten", "unflatten") - {aten.view.dtype}
"""Give the elements of their first argument in the same order, in another shape. `view.dtype` reads bits anew."""

UNIT_AXES = overloads("squeeze", "unsqueeze")
"""Drop or add axes of size 1."""

SPLITS = overloads("split", "split_with_sizes", "chunk", "tensor_split")
"""Cut their first argument along `dim` into views, side by side."""

PROJECTIONS = overloads("linear", "conv1d", "conv2d", "conv3d", "convolution")
"""Products with weights: the second argument."""

PRODUCTS = overloads("matmul", "bmm", "baddbmm", "einsum")
"""Products whose two sides may both be values, as in attention that is written out."""

MATMULS = PROJECTIONS | PRODUCTS | overloads("mm", "addmm")
"""All products; the ops of attention have a table of their own."""

LOOKUPS = overloads("embedding", "index", "index_select", "gather")
"""Take rows of a table by an index."""

EXCHANGES = overloads("all_to_all_single", of=FUNCTIONAL_COLLECTIVES)
"""Send a part of axis 0 to each rank, and give what the ranks sent, side by side."""

WAITS = overloads("wait_tensor", of=FUNCTIONAL_COLLECTIVES)
"""Give the values of their argument, the result of a collective, once it is there."""

COLLECTIVES = EXCHANGES | overloads(
    "all_gather_into_tensor", "all_gather_into_tensor_coalesced", "all_reduce", "all_reduce_coalesced", "broadcast",
    "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced", of=FUNCTIONAL_COLLECTIVES,
)  # fmt: skip
"""Wait for the other processes of a group to call the same."""

SHAPE_ONLY = overloads(
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"
)
"""Depend on the shape of their first argument alone."""

SILENT_VIEWS = overloads(
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "type_as", "meshgrid", "broadcast_tensors",
    "einsum", "_unsafe_view",
) | WAITS  # fmt: skip
"""May return an argument, or a view of it, although their schemas do not say so."""

POINTWISE = SAME_VALUES | overloads(
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "square", "sqrt", "rsqrt", "pow", "exp", "log", "sin",
    "cos", "tanh", "sigmoid", "relu", "silu", "gelu", "softplus", "elu", "leaky_relu", "hardtanh", "erf",
    "mish", "hardswish", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "where", "masked_fill",
    "lerp", "addcmul", "addcdiv", "reciprocal", "floor", "round", "sign", "isnan", "nan_to_num", "eq", "ne",
    "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "conj", "resolve_conj", "copy",
    "threshold", "logaddexp", "log1p", "expm1", "log2", "tan", "atan", "atan2", "ceil", "trunc", "fmod",
    "remainder", "floor_divide", "true_divide", "fill", "log_sigmoid", "hardsigmoid", "relu6", "isinf",
    "isfinite", "real", "imag", "complex", "polar", "bitwise_and", "bitwise_or", "bitwise_not", "float_power",
    "exp2", "__and__", "__or__", "__xor__", "logical_xor", "asin", "acos", "rad2deg", "deg2rad", "zeros_like", "ones_like",
    "full_like", "empty_like",
)  # fmt: skip
"""Compute each element of the result from the elements at its place in the arguments, which broadcast."""


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument `name` of a call: as it is given, or as the schema has it, or `default` where there is none of that name."""
    for position, parameter in enumerate(_parameters(node)):
        if parameter.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value if parameter.has_default_value() else default)
    return default


def int_argument(node: fx.Node, name: str) -> int:
    """The argument `name`, a whole number."""
    value = argument(node, name)
    assert isinstance(value, int), f"{node.name}: {name}={value!r}"
    return value


def ints_argument(node: fx.Node, name: str) -> list[int]:
    """The argument `name`, one whole number or several; none where it is not given."""
    value = argument(node, name)
    return [value] if isinstance(value, int) else list(value or ())


def dim_of(node: fx.Node, rank: int, name: str = "dim") -> int:
    """The axis that the argument `name` says, counted from the left of `rank` axes."""
    dim = int_argument(node, name)
    return dim % rank if rank else 0


def node_argument(node: fx.Node, name: str) -> fx.Node:
    """The argument `name`, a tensor of the graph."""
    value = argument(node, name)
    assert isinstance(value, fx.Node), f"{node.name}: {name}={value!r}"
    return value


def first_input(node: fx.Node) -> fx.Node:
    """The first argument, a tensor of the graph."""
    source = node.args[0]
    assert isinstance(source, fx.Node), f"{node.name} has no tensor in front"
    return source


def nodes_argument(node: fx.Node, name: str) -> list[fx.Node]:
    """The argument `name`, a list of tensors of the graph."""
    return list(nodes_in(argument(node, name)))


def arguments_of(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """The arguments of a call of an op by their names; None for one that is not given."""
    for i, parameter in enumerate(_parameters(node)):
        yield parameter.name, node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name)


def with_arguments(node: fx.Node, changes: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """(args, kwargs) of a call with some arguments replaced."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, parameter in enumerate(_parameters(node)):
        if parameter.name in changes:
            if position < len(args):
                args[position] = changes[parameter.name]
            else:
                kwargs[parameter.name] = changes[parameter.name]
    return args, kwargs


def _parameters(node: fx.Node) -> Sequence[Any]:
    if isinstance(node.target, OpOverload):
        return _parameters_of(node.target)
    schema = schema_of(node.target)
    return () if schema is None else tuple(schema.arguments)


# Schemas never change, and each look at one makes new objects: passes ask for them at every node.
@cache
def _parameters_of(op: OpOverload[..., Any]) -> tuple[Any, ...]:
    return tuple(schema_of(op).arguments)


@cache
def _written_by(op: OpOverload[..., Any]) -> frozenset[str]:
    return frozenset(p.name for p in _parameters_of(op) if p.alias_info is not None and p.alias_info.is_write)


@cache
def shown_by(op: OpOverload[..., Any]) -> frozenset[str]:
    """The parameters whose memory a result may lie in, as the op's schema says."""
    if not any(result.alias_info is not None for result in schema_of(op).returns):
        return frozenset()
    return frozenset(p.name for p in _parameters_of(op) if p.alias_info is not None)


def nodes_in(values: Any) -> Iterator[fx.Node]:
    """The nodes in a nest of arguments."""
    found: list[fx.Node] = []
    fx.map_arg(tuple(values), found.append)
    return iter(found)


_READ_ONLY = {"flex_attention"}
"""Operators of higher order that write to nothing; of all others nobody knows (a Triton kernel writes)."""


def is_operator(node: fx.Node) -> bool:
    """False for calls that run a graph or a kernel of their own, and for those that enter and leave regions of autocast."""
    if isinstance(node.target, OpOverload) or node.target is operator.getitem:
        return True
    return isinstance(node.target, HigherOrderOperator) and node.target.name() in _READ_ONLY


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes to; of a call that says nothing about it, all."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if not is_operator(node):
        return node.all_input_nodes
    written = _written_by(node.target) if isinstance(node.target, OpOverload) else ()
    return list(nodes_in(value for name, value in arguments_of(node) if name in written)) if written else []


def is_functional(node: fx.Node) -> bool:
    """True for a call whose result depends on its arguments alone, and which does nothing but give that result."""
    if isinstance(node.target, OpOverload):
        return not writes(node) and torch.Tag.nondeterministic_seeded not in node.target.tags
    return node.target is operator.getitem


def has_side_effect(node: fx.Node) -> bool:
    """Whether a node that nothing reads must stay: it is an input or the output, or it writes, or may write, to something."""
    # Not `node.is_impure()` alone: to that attention is impure, because it could draw dropout masks.
    return bool(writes(node)) if is_operator(node) else node.is_impure() or isinstance(node.target, HigherOrderOperator)


def is_in_place(node: fx.Node) -> bool:
    """True for `aten.<op>_`, which writes to its first argument."""
    return (
        isinstance(node.target, OpOverload)
        and node.target.namespace == "aten"
        and schema_of(node.target).name.endswith("_")
        and node.args[0] in writes(node)
    )


def out_of_place(op: Any) -> Any:
    """`aten.mul_.Tensor` -> `aten.mul.Tensor`; None if there is none."""
    name, _, overload = op.name().removeprefix("aten::").partition(".")
    return getattr(getattr(aten, name.removesuffix("_"), None), overload or "default", None)
