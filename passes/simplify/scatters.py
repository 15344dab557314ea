"""Exact algebra on a cached step: gather once, scatter once, sum caches that are only ever summed.

The literal form gathers and scatters around every branch and keeps a cache for each. With one selection `idx` the
sampled tokens never need the others, and what is only added can be added beforehand. Four rules, in this order, remove
what is not needed. Each is exact up to rounding; tests compare the result with the literal form:

=====================  =================================================================================
`SinkScatters`         g * scatter(c, idx, v) = scatter(g * c, idx, g[idx] * v), and sums likewise
`ForwardGathers`       gather(scatter(c, idx, v), idx) = v
`WriteRows`            state = scatter(state, idx, v) writes rows idx alone, in place
`MergeCaches`          x + s1 + s2 = x + (s1 + s2): one tensor of state for all
=====================  =================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.ops import CASTS, nodes_argument
from hero_fx.passes.slots import IndexSlot

__all__ = ["ForwardGathers", "SinkScatters", "is_selection"]

aten = torch.ops.aten


def is_selection(index: object) -> bool:
    """True for the indices of a step's sampled tokens: none comes twice.

    They may be counted from another start, and follow each other from several (the tokens of several ranks).
    """
    if isinstance(index, fx.Node) and index.target is aten.cat.default:
        return all(map(is_selection, nodes_argument(index, "tensors")))
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
        if node.target in CASTS and len(operands) == 1:
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
