"""Which values of a graph share memory, and where the graph writes to it.

A model may write to its own buffers, and to temporaries through views that have no functional form; `Functionalize` leaves
such writes alone. A node whose memory is written to has not one value but one before each write and one behind it, so a pass
may compute it elsewhere, or take another node for it, only where no write lies between. This analysis answers that.

Memory is told apart as plain `torch.compile` does it: inputs of the graph share memory if they did when it was traced, and a
call's result shares memory with an argument where the op's schema, or the fake values, say that it may. Ops whose schema is
silent about a view they can return are listed.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import Any

import torch
from torch import fx

from hero_fx.passes.compat import OpOverload, storage_of
from hero_fx.passes.ops import CASTS, SILENT_VIEWS, arguments_of, is_operator, nodes_in, shown_by, writes

__all__ = ["Memory"]

aten = torch.ops.aten


class Memory:
    """The memory of a graph as it is now; nodes that are added later are not known to it."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        self._position = {node: i for i, node in enumerate(nodes)}
        self._above: dict[fx.Node | int, fx.Node | int] = {}
        """Nodes and storages that share memory, as trees: whatever has the same root lies in the same memory."""
        for node in nodes:
            for storage in _storages(node):
                self._join(node, storage)
            for source in _may_show(node):
                self._join(node, source)
        self._writes: dict[fx.Node | int, list[int]] = defaultdict(list)
        self._opaque: list[int] = []
        for i, node in enumerate(nodes):
            for written in writes(node):
                at = self._writes[self._memory(written)]
                if at[-1:] != [i]:
                    at.append(i)
            if node.op == "call_function" and not is_operator(node):
                self._opaque.append(i)
        self._returned = {self._memory(node) for node in graph.output_node().all_input_nodes}

    def _memory(self, item: fx.Node | int) -> fx.Node | int:
        above = self._above.get(item)
        while above is not None:
            further = self._above.get(above)
            if further is not None:  # the next look-up has half the way
                self._above[item] = further
            item, above = above, further
        return item

    def _join(self, a: fx.Node | int, b: fx.Node | int) -> None:
        a, b = self._memory(a), self._memory(b)
        if a != b:
            self._above[a] = b

    def shown(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values may lie in the memory of a node's, itself included, in order."""
        return self._by_memory[self._memory(node)]

    @cached_property
    def _by_memory(self) -> Mapping[fx.Node | int, list[fx.Node]]:
        nodes: dict[fx.Node | int, list[fx.Node]] = defaultdict(list)
        for node in self._position:
            nodes[self._memory(node)].append(node)
        return nodes

    def written(self, node: fx.Node, after: fx.Node | None = None, before: fx.Node | None = None) -> bool:
        """Whether the memory of a value is written to at all, or by a call between two others."""
        first = -1 if after is None else self._position[after]
        last = len(self._position) if before is None else self._position[before]
        return any(first < i < last for i in self._writes.get(self._memory(node), ()))

    def version(self, node: fx.Node, reader: fx.Node) -> int:
        """How many writes to the memory of a value come before a reader: equal for two that read the same."""
        return bisect_left(self._writes.get(self._memory(node), ()), self._position[reader])

    def regions(self, node: fx.Node) -> int:
        """How many calls that are no operators come before a node; equal for two nodes that no such call lies between."""
        return bisect_left(self._opaque, self._position[node])

    def returned(self, node: fx.Node) -> bool:
        """Whether the graph's output may show the memory of a value."""
        return self._memory(node) in self._returned


def _storages(node: fx.Node) -> Iterator[int]:
    value = node.meta.get("val")
    for part in value if isinstance(value, (tuple, list)) else (value,):
        storage = storage_of(part)
        if storage is not None:
            yield storage


def _may_show(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the result of a call may lie in, by the op alone: fake values grow stale in rewrites."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        return node.all_input_nodes
    if not isinstance(node.target, OpOverload):
        return []
    shown = _shown_by(node.target)
    if shown == frozenset() or _copies(node):
        return []
    if shown is None:
        sources = list(nodes_in(node.args))
        return sources if len(sources) == 1 or node.target is not aten.einsum.default else []
    return list(nodes_in(value for name, value in arguments_of(node) if name in shown))


@cache
def _shown_by(op: OpOverload[..., Any]) -> frozenset[str] | None:
    """The parameters whose memory a result may lie in; None where the op's schema is silent about them."""
    return None if op in SILENT_VIEWS else shown_by(op)


def _copies(node: fx.Node) -> bool:
    """True for a cast to another dtype or device: it has memory of its own."""
    if node.target not in CASTS:
        return False
    source = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    value = node.meta.get("val")
    if not isinstance(source, torch.Tensor) or not isinstance(value, torch.Tensor):
        return False
    return source.dtype != value.dtype or source.device != value.device
