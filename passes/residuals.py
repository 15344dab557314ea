"""The residual adds of a graph, and the queries about what depends on what that finding them takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .emit import value_of
from .tokens import is_matmul

__all__ = ["Ancestry", "ResidualAdd", "beneath_casts", "feature_of", "residual_adds"]

aten = torch.ops.aten


class Ancestry:
    """A graph with fast ancestor queries: `above[i]` is the bit set of the nodes that node i depends on."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.above: list[int] = []
        for node in self.nodes:
            bits = 0
            for source in node.all_input_nodes:
                i = self.index[source]
                bits |= self.above[i] | 1 << i
            self.above.append(bits)

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        return bool(self.above[self.index[node]] >> self.index[source] & 1)

    def between(self, sources: Iterable[fx.Node], targets: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes on a path from a source to a target, in order, with the targets and without the sources."""
        source_bits = 0
        for source in sources:
            source_bits |= 1 << self.index[source]
        wanted, first = 0, source_bits & -source_bits
        for target in targets:
            i = self.index[target]
            wanted |= self.above[i] | 1 << i
        wanted &= ~((first << 1) - 1) & ~source_bits
        result = []
        while wanted:
            i = (wanted & -wanted).bit_length() - 1
            wanted &= wanted - 1
            if self.above[i] & source_bits:
                result.append(self.nodes[i])
        return result


def _is_cast(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (
        aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten.clone.default,
        aten.contiguous.default, aten.detach.default, aten.dropout.default, aten._to_copy.default,
    )  # fmt: skip


def beneath_casts(node: fx.Node) -> fx.Node:
    """The node beneath casts and copies."""
    while _is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


@dataclass(slots=True)
class ResidualAdd:
    """`add = residual + update`, where `update` is computed from `source`, a value of the residual's stream."""

    add: fx.Node
    residual: fx.Node
    source: fx.Node
    update: fx.Node
    matmuls: frozenset[fx.Node]
    stream: int = -1


def residual_adds(graph: Ancestry) -> list[ResidualAdd]:
    """Every `add(x, f(x))` in which f holds a matrix product and which keeps x's shape, in order."""
    found: dict[fx.Node, ResidualAdd] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
            continue
        a, b = node.args[:2]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            continue
        shape = value_of(node).shape
        if len(shape) < 3 or value_of(a).shape != shape or value_of(b).shape != shape:
            continue
        for residual, update in ((a, b), (b, a)):
            match = _source_of(graph, found, residual, update)
            if match is not None:
                found[node] = ResidualAdd(node, beneath_casts(residual), match[0], update, match[1])
                break
    return list(found.values())


def _source_of(
    graph: Ancestry, found: dict[fx.Node, ResidualAdd], residual: fx.Node, update: fx.Node
) -> tuple[fx.Node, frozenset[fx.Node]] | None:
    """The value of the residual's stream that `update` reads, and the matrix products in between."""
    value = beneath_casts(residual)
    # x + attention(x) + ffn(x) is two adds; the second one's update reads the stream one add earlier.
    for _ in range(4):
        if graph.depends(update, value):
            matmuls = frozenset(n for n in graph.between([value], [update]) if is_matmul(n))
            return (value, matmuls) if matmuls else None
        if value not in found:
            return None
        value = found[value].residual
    return None


def feature_of(graph: Ancestry, update: fx.Node, sources: Sequence[fx.Node]) -> fx.Node:
    """What a chain of gates (factors that do not depend on the streams) is multiplied with."""

    def moves(node: object) -> bool:
        return isinstance(node, fx.Node) and any(graph.depends(node, s) or node is s for s in sources)

    feature, node = update, update
    while node.op == "call_function":
        if node.target is aten.mul.Tensor and moves(node.args[0]) != moves(node.args[1]):
            node = node.args[0] if moves(node.args[0]) else node.args[1]  # type: ignore[assignment]
            feature = node
        elif _is_cast(node):
            node = node.args[0]  # type: ignore[assignment]
        else:
            break
    return feature
