"""State that keeps its rows: only those of sampled tokens are written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.ops import CASTS
from hero_fx.passes.slots import StateSlot

from .scatters import is_scatter

__all__ = ["WriteRows"]

aten = torch.ops.aten


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
                dtype = value_of(state).dtype
                if value_of(rows).dtype != dtype:
                    rows = emitter.call(aten.to.dtype, rows, dtype)
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
    return node.args[0] if isinstance(node, fx.Node) and node.target in CASTS else node
