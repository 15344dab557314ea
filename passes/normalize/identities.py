"""Ops that return their input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.ops import CASTS, is_in_place

from .functionalize import memory_of

__all__ = ["DropIdentities"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class DropIdentities:
    """Removes ops that return their input: dropout outside training, casts to the dtype the tensor has, `detach`.

    Before::

        dropout = aten.dropout.default(linear, 0.0, False)
        to = aten.to.dtype(dropout, torch.float32)  # linear is float32
        add = aten.add.Tensor(x, to)

    After::

        add = aten.add.Tensor(x, linear)

    Legal because each removed op returns its argument (or an alias of it) bit for bit, and after `Functionalize` no
    node writes to an alias. An op whose result is a graph output stays: outputs keep their identity.
    """

    name: str = "drop_identities"

    def apply(self, gm: fx.GraphModule) -> int:
        returned = set(gm.graph.output_node().all_input_nodes)
        written = {n.args[0] for n in gm.graph.nodes if is_in_place(n)}
        found = [n for n in gm.graph.nodes if _returns_its_input(n) and n not in returned and n not in written]
        for node in found:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        return len(found)


def _returns_its_input(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is aten.dropout.default:
        return bool(not node.args[2] or node.args[1] == 0.0)
    if node.target in (aten.detach.default, aten.alias.default):
        return True
    # Where these copy (another dtype or layout, or `copy=True`), they have memory of their own.
    return node.target in CASTS | {aten.contiguous.default} and memory_of(node) == memory_of(node.args[0])
