"""8-bit floating-point feature state: rows are written as bytes, because few backends can scatter such floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .emit import Emitter, value_of

__all__ = ["WriteBytes"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class WriteBytes:
    """Writes the sampled rows of a state tensor of an 8-bit float as the bytes they are.

    Before::

        index_copy_ = aten.index_copy_.default(y0, 1, idx, rows)  # y0 and rows are float8_e4m3fn

    After::

        view = aten.view.dtype(y0, torch.uint8)
        view_1 = aten.view.dtype(rows, torch.uint8)
        index_copy_ = aten.index_copy_.default(view, 1, idx, view_1)

    Legal because copying rows changes no bits, whatever they stand for; a view of the state is the state.
    """

    name: str = "write_bytes"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        sites = 0
        for node in list(gm.graph.nodes):
            if node.target is not aten.index_copy_.default:
                continue
            state, dim, index, rows = node.args
            dtype = value_of(state).dtype
            if not dtype.is_floating_point or dtype.itemsize != 1:
                continue
            with emitter.before(node):
                view, bits = (emitter.call(aten.view.dtype, x, torch.uint8) for x in (state, rows))
                written = emitter.call(aten.index_copy_.default, view, dim, index, bits)
            node.replace_all_uses_with(state)
            assert not written.users
            gm.graph.erase_node(node)
            sites += 1
        return sites
