"""Looking at FX graphs: render one as text, diff two, count their ops.

One line per node, made to be read in a diff and to stand in a test as the expected graph:

    x: f32[2, 3] = input
    w: f32[5, 3] = input
    linear: f32[2, 5] = aten.linear.default(x, w)
    add: f32[2, 5] = aten.add.Tensor(linear, linear, alpha=2)
    return add

Nothing here is special to hero_fx: it takes any `torch.fx` graph, from Dynamo, `make_fx`, `torch.export` or
`symbolic_trace`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from tabulate import tabulate
from torch import fx

from .compat import OperatorBase, OpOverload, OpOverloadPacket, short_name

__all__ = ["graph_counts_diff", "graph_diff", "op_count", "render"]

Op: TypeAlias = "str | OpOverload[..., Any] | OpOverloadPacket[..., Any]"

_LONG_LIST = 8
"""Longer lists of equal or evenly spaced numbers are written in short: `[0] * 64`."""


def render(gm: fx.GraphModule | fx.Graph) -> str:
    """The graph as text, one line per node: `name: dtype[shape] = op(args)`.

    Types come from `node.meta["val"]`, else from `node.meta["example_value"]` (Dynamo), and are left out
    where a node has neither. A subgraph (of a higher-order op) follows the line of the node that names it,
    indented. Literals are written in full; long lists of numbers by their rule where they have one:
    `[0] * 64`, `[*range(0, 64)]`.
    """
    return "\n".join(_lines(_graph(gm), set()))


def graph_diff(
    before: fx.GraphModule | fx.Graph | str, after: fx.GraphModule | fx.Graph | str, *, context: int = 2
) -> str:
    """What changed between two graphs, as a diff of their renders; the empty string if nothing did.

    Lines start with `- ` (only before), `+ ` (only after) or two spaces (both); `...` stands for unchanged
    lines farther than `context` lines from a change. For a graph that is rewritten in place, keep what
    `render` gave before and pass that string.

    Raises:
        ValueError: `context` is negative.
    """
    if context < 0:
        raise ValueError(f"context={context}: give the unchanged lines to show around a change, 0 or more.")
    old, new = (graph if isinstance(graph, str) else render(graph) for graph in (before, after))
    if old == new:
        return ""
    a, b = old.splitlines(), new.splitlines()
    lines: list[str] = []
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            head = 0 if i == 0 else context
            tail = 0 if i_end == len(a) and j_end == len(b) else context
            lines += (f"  {line}".rstrip() for line in _shorten(a[i:i_end], head, tail))
        else:
            lines += (f"- {line}" for line in a[i:i_end])
            lines += (f"+ {line}" for line in b[j:j_end])
    return "\n".join(lines)


def op_count(gm: fx.GraphModule | fx.Graph, *ops: Op) -> Counter[str]:
    """How often each op is called, by its name without overload (`"aten.add"`), subgraphs included.

    With `ops`, given as `"aten.add"`, `torch.ops.aten.add` or one of its overloads, only these are returned,
    also where their count is 0.
    """
    counts = Counter[str]()
    names: dict[int, str] = {}  # by identity, since ops are slow to hash, and to say their names
    for node in _calls(_graph(gm), set()):
        key = id(node if node.op != "call_function" else node.target)
        if key not in names:
            names[key] = _packet_name(node)
        counts[names[key]] += 1
    if not ops:
        return counts
    return Counter({name: counts[name] for name in map(_requested_name, ops)})


def graph_counts_diff(
    before: fx.GraphModule | fx.Graph | Counter[str], after: fx.GraphModule | fx.Graph | Counter[str]
) -> str:
    """A table of the ops of two graphs: op, calls before, calls after, change.

    For a graph that is rewritten in place, keep what `op_count` gave before and pass that.
    """
    old, new = (x if isinstance(x, Counter) else op_count(x) for x in (before, after))
    rows = [
        (op, old[op], new[op], f"{new[op] - old[op]:+d}" if new[op] != old[op] else "") for op in sorted({*old, *new})
    ]
    return tabulate(rows, headers=("op", "before", "after", "change"))


def _graph(gm: fx.GraphModule | fx.Graph) -> fx.Graph:
    return gm.graph if isinstance(gm, fx.GraphModule) else gm


def _lines(graph: fx.Graph, seen: set[int]) -> Iterator[str]:
    for node in graph.nodes:
        yield _line(node)
        subgraph = _new_subgraph(node, seen)
        if subgraph is not None:
            yield from (f"    {line}" for line in _lines(subgraph, seen))


def _calls(graph: fx.Graph, seen: set[int]) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            yield node
        subgraph = _new_subgraph(node, seen)
        if subgraph is not None:
            yield from _calls(subgraph, seen)


def _new_subgraph(node: fx.Node, seen: set[int]) -> fx.Graph | None:
    """The graph of the `GraphModule` that this node names, at the first node that does."""
    if node.op not in ("get_attr", "call_module"):
        return None
    owner: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name, None)
    if not isinstance(owner, fx.GraphModule) or id(owner) in seen:
        return None
    seen.add(id(owner))
    return owner.graph


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    value = node.meta.get("val", node.meta.get("example_value"))
    annotation = "" if value is None else f": {_type(value)}"
    return f"{node.name}{annotation} = {_expression(node)}"


def _expression(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"self.{node.target}"
    positional, keywords = node.args, node.kwargs
    callee = _function_name(node.target)
    if node.op == "call_module":
        callee = f"self.{node.target}"
    elif node.op == "call_method":
        callee, positional = f"{_argument(positional[0])}.{node.target}", positional[1:]
    arguments = [_argument(value) for value in positional]
    arguments += [f"{name}={_argument(value)}" for name, value in keywords.items()]
    return f"{callee}({', '.join(arguments)})"


def _function_name(target: Callable[..., Any] | str) -> str:
    """`aten.add.Tensor` for ops, `getitem` for builtins, `torch.nn.functional.silu` for other functions."""
    if isinstance(target, str | OpOverload | OpOverloadPacket):
        return str(target)
    name: str = getattr(target, "__name__", None) or type(target).__name__
    module: str | None = getattr(target, "__module__", None)
    if module is None and getattr(torch, name, None) is target:  # `torch.cat` and its like say no module
        module = "torch"
    if module in (None, "_operator", "builtins", "math") or isinstance(target, OperatorBase):
        return name
    return f"{module}.{name}"


def _packet_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op == "call_module":
        return f"self.{node.target}"
    if isinstance(node.target, OpOverload):
        return str(node.target.overloadpacket)
    return _function_name(node.target)


def _requested_name(op: Op) -> str:
    if isinstance(op, OpOverload):
        return str(op.overloadpacket)
    name = str(op).replace("::", ".")
    match name.split("."):
        case [namespace, packet, overload] if namespace != "torch":
            found = getattr(getattr(torch.ops, namespace), packet, None)
            if isinstance(found, OpOverloadPacket) and overload in found.overloads():
                return str(found)
    return name


def _type(value: Any) -> str:
    """`f32[2, 3]` for a tensor, `Sym(s0)` for a symbolic number, `(f32[2], i64[2])` for a tuple or list."""
    if isinstance(value, torch.Tensor):
        return f"{short_name(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return f"Sym({value})"
    if isinstance(value, tuple | list):
        return _parenthesise([_type(element) for element in value])
    return "None" if value is None else type(value).__name__


def _argument(value: Any) -> str:
    match value:
        case fx.Node():
            return value.name
        case torch.Size() | list():
            return _list(value)
        case tuple():
            return _parenthesise([_argument(element) for element in value])
        case dict():
            return "{" + ", ".join(f"{key!r}: {_argument(element)}" for key, element in value.items()) + "}"
        case slice():
            start, stop = ("" if end is None else _argument(end) for end in (value.start, value.stop))
            return f"{start}:{stop}" + ("" if value.step is None else f":{_argument(value.step)}")
        case torch.dtype():
            return short_name(value)
        case torch.device():
            return str(value)
        case torch.layout() | torch.memory_format():
            return str(value).removeprefix("torch.")
        case OpOverload() | OpOverloadPacket():
            return str(value)
        case _:
            return repr(value)


def _list(values: Sequence[Any]) -> str:
    if len(values) > _LONG_LIST and all(type(value) in (int, float, bool) for value in values):
        first = values[0]
        if all(type(value) is type(first) and value == first for value in values):
            return f"[{first!r}] * {len(values)}"
        if all(type(value) is int for value in values) and len({b - a for a, b in pairwise(values)}) == 1:
            step = values[1] - first
            return f"[*{range(first, values[-1] + step, step)}]"
    return f"[{', '.join(map(_argument, values))}]"


def _parenthesise(elements: list[str]) -> str:
    return f"({', '.join(elements)}{',' if len(elements) == 1 else ''})"


def _shorten(lines: list[str], head: int, tail: int) -> list[str]:
    """The first `head` and the last `tail` lines, with `...` for those between."""
    if len(lines) <= head + tail + 1 and head + tail > 0:  # `...` would take the place of one line
        return lines
    return [*lines[:head], "...", *lines[len(lines) - tail :]]
