"""Ops and their arguments, looked up by the names in their schemas: positions, keywords and defaults come out the same."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

__all__ = [
    "argument_of",
    "arguments_of",
    "has_side_effect",
    "is_functional",
    "is_operator",
    "nodes_in",
    "with_arguments",
    "written_by",
]

_READ_ONLY = {"flex_attention"}
"""Operators of higher order that write to nothing; of all others nobody knows (a Triton kernel writes)."""


def _parameters(node: fx.Node) -> list[Any]:
    schema = getattr(node.target, "_schema", None)
    return [] if schema is None else list(schema.arguments)


def argument_of(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument `name` of a call as it is given, by default, or `default` where the op has none of that name."""
    for position, parameter in enumerate(_parameters(node)):
        if parameter.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value if parameter.has_default_value() else default)
    return default


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


def is_functional(node: fx.Node) -> bool:
    """True for a call whose result depends on its arguments alone, and which does nothing but give that result."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
    return node.target is operator.getitem


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes to; of a call that says nothing about it, all."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        if not schema.is_mutable:
            return []
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return list(nodes_in(value for name, value in arguments_of(node) if name in written))
    return [] if is_operator(node) else node.all_input_nodes


def is_operator(node: fx.Node) -> bool:
    """False for calls that run a graph or a kernel of their own, and for those that enter and leave regions of autocast."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.target.name() in _READ_ONLY
    return isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem


def has_side_effect(node: fx.Node) -> bool:
    """Whether a call does more than give its result: it writes, or may write, to what it is given."""
    # Not `node.is_impure()`: to that attention is impure, because it could draw dropout masks.
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return not is_operator(node)
    return node.op == "call_function" and node.is_impure()


def arguments_of(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """The arguments of a call by the names in its schema; None for one that is not given."""
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        yield argument.name, node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)


def nodes_in(values: Any) -> Iterator[fx.Node]:
    """The nodes in a nest of arguments."""
    found: list[fx.Node] = []
    fx.map_arg(tuple(values), found.append)
    return iter(found)
