"""What a Dynamo graph computes, apart from its sizes: a batch of requests is to be the program of one request.

Dynamo traces a model for one request, and once more for a batch of several. The two graphs are compared op by op. Where they
do the same, with sizes that differ by the number of requests alone, what the model makes of a batch is known to be what it
makes of one request, for each. Python code that goes by the batch size, other numbers, or a flag of the model that has
changed in between, make another program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hero_fx.passes import compat

__all__ = ["Input", "OtherProgram", "Program", "own_rows", "read"]


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a graph."""

    name: str
    """Where Dynamo has it from, such as `L['timestep']`."""
    shape: tuple[Any, ...] = ()
    """Ints, and sympy's expressions for symbolic sizes."""
    stride: tuple[int, ...] = ()
    """Of the call that was traced."""
    kind: tuple[Any, ...] | None = None
    """Dtype and device; None for a number."""
    value: int | float | None = None
    """Of a number, at the call that was traced."""


@dataclass(frozen=True, slots=True)
class _Result:
    """The result of an op, or an input that is a tensor, by its place among these."""

    number: int


@dataclass(frozen=True, slots=True)
class Program:
    """A Dynamo graph."""

    inputs: tuple[Input, ...]
    ops: tuple[tuple[Any, ...], ...]
    """Of each op its target and arguments; ops on sizes are left out, and stand as what they give."""
    outputs: tuple[tuple[Any, ...] | None, ...]
    """Shapes, as of inputs; None for what is no tensor."""

    @property
    def tensors(self) -> tuple[Input, ...]:
        """The inputs that are tensors."""
        return tuple(value for value in self.inputs if value.kind is not None)


def read(gm: fx.GraphModule) -> Program:
    """The program of a Dynamo graph."""
    known: dict[fx.Node, Any] = {}
    inputs, ops, outputs, count = [], [], [], 0
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if node.op == "placeholder":
            inputs.append(_input(node, value))
        elif node.op == "output":
            ops.append(("output", _encoded(node.args, known)))
            outputs = [_shape(argument) for argument in _listed(node.args[0])]
            continue
        elif _is_size(value):
            known[node] = _encoded(value, known)
            continue
        elif node.op == "get_attr":
            ops.append((node.op, _attribute(gm, str(node.target))))
        else:
            ops.append(_op(node, known))
        if node.op == "placeholder" and not isinstance(value, torch.Tensor):
            known[node] = _encoded(value, known)
        else:
            known[node] = _Result(count)
            count += 1
    return Program(tuple(inputs), tuple(ops), tuple(outputs))


def _op(node: fx.Node, known: Mapping[fx.Node, Any]) -> tuple[Any, ...]:
    # The last argument is whether autocast keeps casts, which no value depends on.
    args = node.args[:-1] if node.target is compat.enter_autocast else node.args
    return node.op, node.target, _encoded(args, known), _encoded(node.kwargs, known)


def _input(node: fx.Node, value: Any) -> Input:
    name = compat.source_name(node)
    if isinstance(value, torch.Tensor):
        shape, stride = tuple(map(compat.size_of, value.shape)), tuple(map(compat.size_now, value.stride()))
        return Input(name, shape, stride, (value.dtype, value.device))
    return Input(name, value=compat.size_now(value) if isinstance(value, torch.SymInt) else value)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else [value]


def _shape(argument: object) -> tuple[int, ...] | None:
    value = argument.meta.get("example_value") if isinstance(argument, fx.Node) else None
    return tuple(map(compat.size_of, value.shape)) if isinstance(value, torch.Tensor) else None


def _is_size(value: Any) -> bool:
    """Whether an op gives a number, or several, and no tensor."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_size, value))
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return read(value) if isinstance(value, fx.GraphModule) else value


def _encoded(value: Any, known: Mapping[fx.Node, Any]) -> Any:
    match value:
        case fx.Node():
            return known[value]
        case torch.SymInt():
            return compat.size_of(value)
        case slice():
            return slice, *(_encoded(part, known) for part in (value.start, value.stop, value.step))
        case tuple() | list():
            return tuple(_encoded(part, known) for part in value)
        case dict():
            return tuple((key, _encoded(part, known)) for key, part in value.items())
        case _:
            return value


class OtherProgram(ValueError):
    """A batch that is not the program of one request; the message is a phrase that says where."""


def own_rows(one: Program, batch: Program, shapes: Sequence[Sequence[int]], requests: int) -> tuple[bool, ...]:
    """Which tensors of a batch have rows for each request; the others are shared.

    With the sizes of one request in place of the batch's symbolic ones, all of its sizes must be those of one request.

    Args:
        one: the program of one request.
        batch: that of a batch, with its symbolic sizes.
        shapes: of the batch's tensors, in a call with `requests` requests.

    Raises:
        OtherProgram: they are not the same program.
    """
    names, others = [value.name for value in one.tensors], [value.name for value in batch.tensors]
    if names != others:
        differ = ", ".join(sorted({*names} ^ {*others})[:3])
        raise OtherProgram(f"they do not take the same tensors ({differ or 'another order'})")
    own = []
    for mine, theirs, shape in zip(one.tensors, batch.tensors, shapes, strict=True):
        shared = tuple(shape) == mine.shape
        if mine.kind != theirs.kind or not (shared or tuple(shape) == _times(requests, mine.shape)):
            raise OtherProgram(
                f"{_text(mine, mine.shape)} for one request, and {_text(theirs, shape)} in a batch of {requests}"
            )
        own.append(not shared)
    alone = _sizes(batch.tensors, [value.shape for value in one.tensors])
    if not alone:
        raise OtherProgram("the batch was traced with a static size: leave dynamic=False out of torch.compile")
    rule = _Rule(alone)
    pairs = zip(one.ops, batch.ops, strict=False)
    first = next(((mine, theirs) for mine, theirs in pairs if not rule.same(mine, theirs)), None)
    if first is not None or len(one.ops) != len(batch.ops):
        what = "" if first is None else f" ({_name(first[0])} for one request, {_name(first[1])} in the batch)"
        raise OtherProgram(f"the model does not run the same ops for both{what}")
    now = _sizes(batch.tensors, shapes)
    for i, (expected, found) in enumerate(zip(one.outputs, batch.outputs, strict=True)):
        there = found and tuple(int(size.subs(now)) if hasattr(size, "subs") else size for size in found)
        if not expected or there != _times(requests, expected):
            raise OtherProgram(
                f"output {i} has the shape {expected} for one request, and {there} in a batch of {requests}"
            )
    return tuple(own)


def _times(requests: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of that many along the first axis; that of a scalar stays."""
    return (*(requests * size for size in shape[:1]), *shape[1:])


def _sizes(inputs: Sequence[Input], shapes: Sequence[Sequence[int]]) -> dict[Any, int]:
    """What the symbols in the shapes of inputs are where the inputs have these shapes.

    Raises:
        OtherProgram: they have no shapes that these symbols can stand for.
    """
    found: dict[Any, int] = {}
    for value, shape in zip(inputs, shapes, strict=True):
        for symbol, size in zip(value.shape, shape, strict=True):
            if getattr(symbol, "is_Symbol", False) and found.setdefault(symbol, size) != size:
                raise OtherProgram(f"sizes that are one in the batch are {found[symbol]} and {size} apart from it")
    return found


def _text(value: Input, shape: Sequence[int]) -> str:
    assert value.kind is not None
    return f"{value.name} is {value.kind[0]} {list(shape)} on {value.kind[1]}"


def _name(op: Sequence[Any]) -> str:
    target = op[1] if len(op) > 1 else op[0]
    return str(getattr(target, "__name__", target))


@dataclass(frozen=True, slots=True)
class _Rule:
    """When two encoded values are the same."""

    symbols: Mapping[Any, int]

    def same(self, own: Any, theirs: Any) -> bool:
        if isinstance(own, tuple) and isinstance(theirs, tuple):
            return len(own) == len(theirs) and all(map(self.same, own, theirs))
        if isinstance(own, Program) and isinstance(theirs, Program):
            return self.same(own.ops, theirs.ops)
        if isinstance(own, torch.Tensor) and isinstance(theirs, torch.Tensor):
            return own is theirs or (
                own.dtype == theirs.dtype and own.shape == theirs.shape and torch.equal(own, theirs)
            )
        if hasattr(theirs, "free_symbols"):
            return bool(isinstance(own, int) and theirs.subs(self.symbols) == own)
        if type(own) is not type(theirs):
            return False
        return bool(own == theirs)
