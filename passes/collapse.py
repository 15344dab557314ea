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

from .emit import Emitter, value_of

__all__ = ["CommonSubexpressions", "ForwardGathers", "SinkScatters", "WriteRows"]

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

    Legal because both nodes apply the same functional op to the same nodes and constants; ops that write in place, draw
    random numbers, or return a view of something that is written to are left alone.
    """

    name: str = "common_subexpressions"

    def apply(self, gm: fx.GraphModule) -> int:
        seen: dict[Any, fx.Node] = {}
        written = {n.args[0] for n in gm.graph.nodes if _writes(n)}
        sites = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or _writes(node) or written.intersection(node.all_input_nodes):
                continue
            if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
                continue
            key = _key((node.target, node.args, tuple(sorted(node.kwargs.items()))))
            if key is None:
                continue
            if key in seen:
                node.replace_all_uses_with(seen[key])
                gm.graph.erase_node(node)
                sites += 1
            else:
                seen[key] = node
        return sites


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


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


def is_scatter(node: object) -> bool:
    """True for `index_copy` nodes, the scatter of sampled tokens."""
    return isinstance(node, fx.Node) and node.target is aten.index_copy.default


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
    """

    name: str = "sink_scatters"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        sites = 0
        for node in list(gm.graph.nodes):
            if not any(map(is_scatter, node.args)):
                continue
            with emitter.before(node):
                moved = self._move(emitter, node)
            if moved is not None:
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
            return self._scatter(emitter, node, scatters[0])
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardGathers:
    """A gather of what was just scattered is what was scattered.

    Before::

        merged = aten.index_copy.default(c, 1, idx, v)
        sampled = aten.index_select.default(merged, 1, idx)  # the next branch's input
        norm = aten.layer_norm.default(sampled, [D])

    After::

        norm = aten.layer_norm.default(v, [D])

    Legal because idx has no repeats (a selection is a set of tokens) and both ops use the same axis and the same idx.
    With it the shallow layers run on the sampled tokens from end to end: one gather in front, one scatter behind.
    """

    name: str = "forward_gathers"

    def apply(self, gm: fx.GraphModule) -> int:
        sites = 0
        for node in list(gm.graph.nodes):
            if node.target is not aten.index_select.default:
                continue
            source, dim, index = node.args
            if is_scatter(source) and source.args[1:3] == (dim, index):
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

    Legal where every other reader of the state tensor comes before the write (or the scattered tensor has no reader but
    the `copy_`: then the write moves to the end), and the state's dtype is no wider than the features': rows that are not
    written keep their bits.
    """

    name: str = "write_rows"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        sites = 0
        for copy in list(gm.graph.nodes):
            if copy.target is not aten.copy_.default:
                continue
            state, scatter = copy.args[:2]
            assert isinstance(state, fx.Node)
            if not is_scatter(scatter) or _beneath_cast(scatter.args[0]) is not state:
                continue
            base, dim, index, rows = scatter.args
            readers = [user for user in scatter.users if user is not copy]
            if readers:
                others = [user for user in state.users if user not in (scatter, copy)]
                if base is not state or any(user > scatter for user in others):
                    continue
            with emitter.before(scatter if readers else copy):
                narrow = value_of(state).dtype
                if value_of(rows).dtype != narrow:
                    rows = emitter.call(aten.to.dtype, rows, narrow)
                emitter.call(aten.index_copy_.default, state, dim, index, rows)
            gm.graph.erase_node(copy)
            scatter.replace_all_uses_with(state)
            gm.graph.erase_node(scatter)
            sites += 1
        return sites


def _beneath_cast(node: object) -> object:
    return node.args[0] if isinstance(node, fx.Node) and node.target in _CASTS else node
