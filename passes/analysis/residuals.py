"""The residual adds of a graph, and fast queries about which node depends on which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import PRODUCTS, SAME_VALUES, SHAPE_ONLY, argument, first_input

from .tokens import is_matmul, sizes_of

__all__ = [
    "Ancestry", "ResidualAdd", "beneath_casts", "feature_of", "is_product_of_values", "residual_adds",
]  # fmt: skip

aten = torch.ops.aten


class Ancestry:
    """A graph with fast ancestor queries: `above[i]` is the bit set of the nodes that node i depends on."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.above: list[int] = []
        for node in self.nodes:
            bits = 0
            for source in node.all_input_nodes if node.target not in SHAPE_ONLY else ():
                i = self.index[source]
                bits |= self.above[i] | 1 << i
            self.above.append(bits)
        # Where no one says what is a weight, every input may be a value.
        calls = [n for n in graph.find_nodes(op="placeholder") if n.meta.get("model_input", True)]
        self.calls = sum(1 << self.index[n] for n in calls)

    def depends_on_call(self, node: fx.Node) -> bool:
        """True for what depends on the call's arguments, not on weights alone."""
        i = self.index[node]
        return bool((self.above[i] | 1 << i) & self.calls)

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


def beneath_casts(node: fx.Node) -> fx.Node:
    """The node beneath casts and copies."""
    while node.target in SAME_VALUES:
        node = first_input(node)
    return node


@dataclass(slots=True)
class ResidualAdd:
    """`add = residual + update`, where `update` is computed from `source`, a value of the residual's stream."""

    add: fx.Node
    residual: fx.Node
    source: fx.Node
    update: fx.Node
    matmuls: frozenset[fx.Node]
    attends: bool
    """Whether the update mixes tokens by attention, as an op or written out."""
    stream: int = -1


class _Found:
    """The residual adds found so far, with what the search for the next one asks of them."""

    def __init__(self, graph: Ancestry) -> None:
        self.graph = graph
        self.by_add: dict[fx.Node, ResidualAdd] = {}
        self._readers: dict[fx.Node, dict[fx.Node, None]] = {}
        self._adds = 0  # bit sets of nodes
        self._chains: dict[fx.Node, int] = {}

    def put(self, found: ResidualAdd) -> None:
        self.by_add[found.add] = found
        self._readers.setdefault(found.residual, {})[found.add] = None
        index = self.graph.index
        self._adds |= 1 << index[found.add]
        self._chains[found.add] = self._chain(found.residual) | 1 << index[found.add]

    def drop(self, found: ResidualAdd) -> None:
        del self.by_add[found.add], self._readers[found.residual][found.add], self._chains[found.add]
        self._adds &= ~(1 << self.graph.index[found.add])

    def _chain(self, value: fx.Node) -> int:
        """A value of a stream and those before it, back to its root."""
        return self._chains.get(value, 1 << self.graph.index[value])

    def latest(self, value: fx.Node, update: fx.Node) -> fx.Node | None:
        """The latest of a stream's values, up to `value`, that `update` depends on."""
        met = self._chain(value) & self.graph.above[self.graph.index[update]]
        return self.graph.nodes[met.bit_length() - 1] if met else None

    def next(self, value: fx.Node, update: fx.Node) -> ResidualAdd | None:
        """The first add to a stream's value on whose sum `update` depends, or which it is."""
        adds = self._readers.get(value, ())
        return next((self.by_add[a] for a in adds if a is update or self.graph.depends(update, a)), None)

    def between(self, source: fx.Node, update: fx.Node) -> list[ResidualAdd]:
        """The adds that depend on `source` and that `update` depends on."""
        start = self.graph.index[source] + 1
        bits = (self._adds & self.graph.above[self.graph.index[update]]) >> start
        adds = []
        while bits:
            adds.append(self.graph.nodes[start + (bits & -bits).bit_length() - 1])
            bits &= bits - 1
        return [self.by_add[add] for add in adds if self.graph.depends(add, source)]


def residual_adds(graph: Ancestry) -> list[ResidualAdd]:
    """Every `add(x, f(x))` in which f holds a matrix product and which keeps x's shape, in order.

    x is [batch, tokens, width], or [tokens, width] if the stream has attention (without it, that is an embedding).

    An add around whole layers (`x + stack(x)`) does not count: the adds within it do. An add within a branch, to what its
    attention gives (`x + project(a + cross(a)), a = attention(x)`), does not count either: the outer add does.

    Raises:
        ValueError: how large a stream is only the values of an input tell.
    """
    found = _Found(graph)
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not aten.add.Tensor or argument(node, "alpha") != 1:
            continue
        a, b = node.args[:2]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            continue
        shape = sizes_of(node)
        if len(shape) < 2 or sizes_of(a) != shape or sizes_of(b) != shape:
            continue
        for residual, update in ((a, b), (b, a)):
            source = _source_of(graph, found, beneath_casts(residual), update)
            body = graph.between([source], [update]) if source is not None else []
            matmuls = frozenset(n for n in body if is_matmul(n))
            if source is not None and matmuls:
                attends = any(map(_mixes_tokens(graph, source), matmuls))
                for inner in [o for o in found.between(source, update) if _is_part(graph, found, o, source, update)]:
                    found.drop(inner)
                found.put(ResidualAdd(node, beneath_casts(residual), source, update, matmuls, attends))
                break
    adds = list(found.by_add.values())
    attended = {_root(found, f.add) for f in adds if f.attends}
    adds = [f for f in adds if value_of(f.add).dim() > 2 or _root(found, f.add) in attended]
    _refuse_unknown_sizes(adds)
    return adds


def _refuse_unknown_sizes(adds: Sequence[ResidualAdd]) -> None:
    for found in adds:
        sizes = sizes_of(found.add)
        if any(isinstance(size, str) for size in sizes):
            raise ValueError(
                f"the residual stream at {found.add.name} is {list(sizes)}: its number of tokens depends on the values of an "
                "input (a mask that cuts text to its length, for example), but feature state has a fixed size; cut the input "
                "to its length before the call, or call the model in a way that masks tokens and keeps them (often: with a "
                "batch of 2 or more)"
            )


def _root(found: _Found, value: fx.Node) -> fx.Node:
    """The value in front of the first add of a stream."""
    while value in found.by_add:
        value = found.by_add[value].residual
    return value


def _source_of(graph: Ancestry, found: _Found, value: fx.Node, update: fx.Node) -> fx.Node | None:
    """The value of the residual's stream that `update` reads; None if it reads none, or if whole layers lie between."""
    # x + attention(x) + ffn(x) is two adds; the second one's update reads the stream one add earlier.
    source = found.latest(value, update)
    if source is None:
        return None
    # x + ffn(norm(x + attention(x))): the second one's update reads the stream one add later.
    while (other := found.next(source, update)) is not None:
        # x + stack(x) and x + linear(stack(x)): the skip connection goes around FFNs too.
        if not other.attends:
            return None
        source = other.add
    if source is update:
        return None
    within = (o for o in found.between(source, update) if o.attends)
    return None if any(not _is_part(graph, found, o, source, update) for o in within) else source


def _is_part(graph: Ancestry, found: _Found, inner: ResidualAdd, source: fx.Node, update: fx.Node) -> bool:
    """Whether an add lies within the branch from `source` to `update`: then its stream begins with what attention gives.

    A stream of layers begins with a value that no attention within the branch has made.
    """
    if not (graph.depends(inner.add, source) and graph.depends(update, inner.add)):
        return False
    return any(map(_mixes_tokens(graph, source), graph.between([source], [_root(found, inner.add)])))


def _mixes_tokens(graph: Ancestry, source: fx.Node) -> Callable[[fx.Node], bool]:
    return lambda node: node.target in ATTENTION or _is_score(graph, node, source)


def _is_score(graph: Ancestry, node: fx.Node, source: fx.Node) -> bool:
    """A product of two values that both depend on the stream: queries and keys, or keys and values (linear attention)."""
    if node.target not in PRODUCTS:
        return False
    moved = [n for n in node.all_input_nodes if n is source or graph.depends(n, source)]
    return len(moved) > 1


def is_product_of_values(graph: Ancestry, node: fx.Node) -> bool:
    """A product of two values that depend on what the model is called with: attention written out."""
    return node.target in PRODUCTS and all(graph.depends_on_call(n) for n in node.all_input_nodes)


def feature_of(graph: Ancestry, update: fx.Node, sources: Sequence[fx.Node]) -> fx.Node:
    """The branch's output before its gates (factors that do not depend on the streams) and the norm behind it, if any."""

    def moves(node: fx.Node) -> bool:
        return any(graph.depends(node, s) or node is s for s in sources)

    feature, node = update, update
    while node.op == "call_function":
        factors = [factor for factor in node.args if isinstance(factor, fx.Node) and moves(factor)]
        if node.target is aten.mul.Tensor and len(factors) == 1:
            (node,) = factors
            feature = node
        elif node.target in SAME_VALUES:
            node = first_input(node)
        else:
            break
    return _projection_of(feature, moves, sources) or feature


def _projection_of(feature: fx.Node, moves: Callable[[fx.Node], bool], sources: Sequence[fx.Node]) -> fx.Node | None:
    """The one projection that all of `feature` is computed from, where no one else reads it: `norm(linear)` -> `linear`."""
    passed, products, todo = {feature}, set[fx.Node](), [feature]
    if is_matmul(feature):
        return None
    while todo:
        for source in todo.pop().all_input_nodes:
            if not moves(source) or source in passed:
                continue
            if is_matmul(source):
                products.add(source)
            elif source in sources or source.op != "call_function":
                return None
            else:
                passed.add(source)
                todo.append(source)
        if len(products) > 1:
            return None
    (product,) = products
    inside = all(user in passed for node in (passed - {feature}) | products for user in node.users)
    same = isinstance(value_of(product), torch.Tensor) and sizes_of(product) == sizes_of(feature)
    return product if inside and same else None
