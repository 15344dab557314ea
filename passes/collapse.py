"""Exact algebra on a cached step: gather once, scatter once, sum caches that are only ever summed.

The literal lowering gathers and scatters around every branch and keeps a cache for each. With one selection `idx` the
sampled tokens never need the others, and what is only added can be added beforehand. Four rules, in this order, take the
literal graph to its floor; each is exact up to rounding, and the literal form stays as their oracle:

=====================  =================================================================================
`SinkScatters`         g * scatter(c, idx, v) = scatter(g * c, idx, g[idx] * v), and sums likewise
`ForwardGathers`       gather(scatter(c, idx, v), idx) = v
`WriteRows`            state = scatter(state, idx, v) writes rows idx alone, in place
`MergeCaches`          x + s1 + s2 = x + (s1 + s2): one tensor of state for all
=====================  =================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .emit import Emitter, IndexSlot, StateSlot, value_of
from .memory import Memory, is_functional

__all__ = ["CommonSubexpressions", "ForwardGathers", "SinkScatters", "WriteRows", "is_selection"]

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonSubexpressions:
    """Computes equal expressions once: above all the gathers of rotary tables that every shallow layer repeats.

    Before::

        cos_1 = aten.index_select.default(cos, 0, idx)  # layer 0
        cos_2 = aten.index_select.default(cos, 0, idx)  # layer 1

    After::

        cos_1 = aten.index_select.default(cos, 0, idx)  # both layers

    Legal because both nodes apply the same op, one that writes nothing and draws no random numbers, to the same nodes and
    constants; because between them nothing writes to the memory of what they read, be it through a view of it, and no region
    of autocast begins or ends; because nothing ever writes to the memory of their results; and because not both results are
    returned, which the caller may write to one by one. Operators of higher order are left alone.
    """

    name: str = "common_subexpressions"

    def apply(self, gm: fx.GraphModule) -> int:
        memory = Memory(gm.graph)
        seen: dict[Any, fx.Node] = {}
        sites = 0
        for node in list(gm.graph.nodes):
            if not is_functional(node) or memory.written(node):
                continue
            key = _key((node.target, node.args, tuple(sorted(node.kwargs.items()))))
            if key is None:
                continue
            key = key, memory.regions(node), tuple(memory.version(source, node) for source in node.all_input_nodes)
            other = seen.setdefault(key, node)
            if other is not node and not (memory.returned(node) and memory.returned(other)):
                node.replace_all_uses_with(other)
                gm.graph.erase_node(node)
                sites += 1
        return sites


def _key(value: Any) -> Any:
    """A hashable form of a node's target and arguments; None if there is none. 1, 1.0 and True are kept apart."""
    if isinstance(value, (list, tuple)):
        parts = tuple(_key(v) for v in value)
        return None if None in parts else (type(value).__name__, parts)
    if isinstance(value, slice):
        return None
    try:
        hash(value)
    except TypeError:
        return None
    return (type(value).__name__, value)


def is_selection(index: object) -> bool:
    """True for the indices of a step's sampled tokens, also where they are counted from another start: none comes twice."""
    while isinstance(index, fx.Node) and index.target is aten.add.Tensor and isinstance(index.args[1], int):
        index = index.args[0]
    return isinstance(index, fx.Node) and isinstance(index.meta.get("slot"), IndexSlot)


def is_scatter(node: object) -> bool:
    """True for the scatter of sampled tokens; an `index_copy` of the model's own is none."""
    if not isinstance(node, fx.Node) or node.target is not aten.index_copy.default or not is_selection(node.args[2]):
        return False
    dim = node.args[1]
    assert isinstance(dim, int)
    assert dim >= 0, "the scatter of sampled tokens names its axis from the left"
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkScatters:
    """Moves the scatter of sampled tokens behind the gate and the residual add.

    Before (pre-gate; c is the branch's cache, v its fresh rows)::

        merged = aten.index_copy.default(c, 1, idx, v)
        mul = aten.mul.Tensor(gate, merged)
        add = aten.add.Tensor(x, mul)

    After::

        mul = aten.mul.Tensor(gate, c)
        add = aten.add.Tensor(x, mul)
        x_1 = aten.index_select.default(x, 1, idx)
        v_1 = aten.mul.Tensor(gate, v)
        v_2 = aten.add.Tensor(x_1, v_1)
        merged = aten.index_copy.default(add, 1, idx, v_2)

    Legal for any selection and gate point, because products with a factor that is constant along the tokens (or gathered
    by idx), sums and casts are pointwise in tokens. Two scatters that are added become one if they use the same idx; a
    scatter plus a whole tensor moves only where the sum is gathered by idx again, which needs one selection for both.
    Only scatters by a step's selection move, and none whose memory, or whose parts' memory, the model writes to in between.
    """

    name: str = "sink_scatters"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, memory = Emitter(gm), Memory(gm.graph)
        made: set[fx.Node] = set()  # scatters that were moved: nothing writes to what they are made of
        sites = 0
        for node in list(gm.graph.nodes):
            scatters = [a for a in node.args if isinstance(a, fx.Node) and is_scatter(a)]
            if not scatters or memory.written(node) or not all(s in made or _lasts(memory, s, node) for s in scatters):
                continue
            with emitter.before(node):
                moved = self._move(emitter, node)
            if moved is not None:
                made.add(moved)
                node.replace_all_uses_with(moved)
                gm.graph.erase_node(node)
                sites += 1
        return sites

    def _move(self, emitter: Emitter, node: fx.Node) -> fx.Node | None:
        """The scatter that `node` becomes, or None."""
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        scatters = [a for a in operands if is_scatter(a)]
        if node.kwargs:
            return None
        if node.target in _CASTS and len(operands) == 1:
            copies = value_of(node).dtype != value_of(operands[0]).dtype
            return self._scatter(emitter, node, scatters[0]) if copies else None
        if node.target not in (aten.mul.Tensor, aten.add.Tensor) or len(operands) > 2:
            return None
        first = scatters[0]
        _, dim, index, _ = first.args
        if value_of(node).shape != value_of(first).shape:
            return None
        if len(scatters) == 2:
            return self._scatter(emitter, node, first) if scatters[1].args[1:3] == (dim, index) else None
        if node.target is aten.add.Tensor and not any(
            user.target is aten.index_select.default and user.args[1:] == (dim, index) for user in node.users
        ):
            return None
        return self._scatter(emitter, node, first)

    @staticmethod
    def _scatter(emitter: Emitter, node: fx.Node, scatter: fx.Node) -> fx.Node:
        _, dim, index, _ = scatter.args
        rank = value_of(scatter).dim()
        whole, rows = list(node.args), list(node.args)
        for i, operand in enumerate(node.args):
            if not isinstance(operand, fx.Node):
                continue
            if is_scatter(operand):
                whole[i], rows[i] = operand.args[0], operand.args[3]
                continue
            axis = dim - (rank - value_of(operand).dim())
            if axis >= 0 and value_of(operand).shape[axis] != 1:
                rows[i] = emitter.call(aten.index_select.default, operand, axis, index)
        base = emitter.call(node.target, *whole)
        fresh = emitter.call(node.target, *rows)
        return emitter.call(aten.index_copy.default, base, dim, index, fresh)


def _lasts(memory: Memory, scatter: fx.Node, reader: fx.Node) -> bool:
    """Whether what a scatter is made of, and its result, is the same when it is read."""
    base, _, _, rows = scatter.args
    assert isinstance(base, fx.Node)
    assert isinstance(rows, fx.Node)
    return not memory.written(scatter) and not any(memory.written(n, scatter, reader) for n in (base, rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardGathers:
    """A gather of what was just scattered is what was scattered.

    Before::

        merged = aten.index_copy.default(c, 1, idx, v)
        sampled = aten.index_select.default(merged, 1, idx)  # the next branch's input
        norm = aten.layer_norm.default(sampled, [D])

    After::

        norm = aten.layer_norm.default(v, [D])

    Legal because idx is a step's selection, a set of tokens without repeats, because both ops use the same axis and the same
    idx, and because nothing writes to the memory of v, of what it was scattered into, or of what was gathered. With it the
    shallow layers run on the sampled tokens from end to end: one gather in front, one scatter behind.
    """

    name: str = "forward_gathers"

    def apply(self, gm: fx.GraphModule) -> int:
        memory, sites = Memory(gm.graph), 0
        for node in list(gm.graph.nodes):
            if node.target is not aten.index_select.default:
                continue
            source, dim, index = node.args
            if (
                is_scatter(source)
                and source.args[1:3] == (dim, index)
                and not any(map(memory.written, (node, source, source.args[3])))
            ):
                node.replace_all_uses_with(source.args[3])
                gm.graph.erase_node(node)
                sites += 1
        return sites


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteRows:
    """Writes the sampled rows of a state tensor in place, instead of all of it at the end.

    Before::

        keys = aten.index_copy.default(k, 2, idx, k_1)  # k is feature state
        sdpa = aten.scaled_dot_product_attention.default(q, keys, values)
        copy_ = aten.copy_.default(k, keys)

    After::

        index_copy_ = aten.index_copy_.default(k, 2, idx, k_1)
        sdpa = aten.scaled_dot_product_attention.default(q, k, values)

    Legal where every other reader of the state tensor, or of a view of it, comes before the write (or the scattered tensor
    has no reader but the `copy_`: then the write moves to the end), and the state's dtype is no wider than the features':
    rows that are not written keep their bits. What the model returns, or writes to, stays a tensor of its own.
    """

    name: str = "write_rows"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, memory = Emitter(gm), Memory(gm.graph)
        sites = 0
        for copy in list(gm.graph.nodes):
            if copy.target is not aten.copy_.default:
                continue
            state, scatter = copy.args[:2]
            assert isinstance(state, fx.Node)
            if not isinstance(state.meta.get("slot"), StateSlot) or not is_scatter(scatter):
                continue
            assert isinstance(scatter, fx.Node)
            if not self._may_write(memory, state, scatter, copy):
                continue
            _, dim, index, rows = scatter.args
            assert isinstance(rows, fx.Node)
            with emitter.before(scatter if len(scatter.users) > 1 else copy):
                narrow = value_of(state).dtype
                if value_of(rows).dtype != narrow:
                    rows = emitter.call(aten.to.dtype, rows, narrow)
                emitter.call(aten.index_copy_.default, state, dim, index, rows)
            gm.graph.erase_node(copy)
            scatter.replace_all_uses_with(state)
            gm.graph.erase_node(scatter)
            sites += 1
        return sites

    @staticmethod
    def _may_write(memory: Memory, state: fx.Node, scatter: fx.Node, copy: fx.Node) -> bool:
        base, _, _, rows = scatter.args
        assert isinstance(rows, fx.Node)
        if _beneath_cast(base) is not state or memory.written(scatter) or memory.returned(scatter):
            return False
        if len(scatter.users) == 1:
            return not memory.written(rows, scatter, copy)
        readers = {user for shown in memory.shown(state) for user in shown.users} - {scatter, copy}
        return base is state and not any(user > scatter for user in readers)


def _beneath_cast(node: object) -> object:
    return node.args[0] if isinstance(node, fx.Node) and node.target in _CASTS else node
