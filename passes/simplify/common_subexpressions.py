"""Equal expressions, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.ops import is_functional

__all__ = ["CommonSubexpressions"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonSubexpressions:
    """Computes equal expressions once: above all the gathers of rotary tables that every shallow layer repeats.

    Before::

        cos_1 = aten.index_select.default(cos, 0, idx)  # layer 0
        cos_2 = aten.index_select.default(cos, 0, idx)  # layer 1

    After::

        cos_1 = aten.index_select.default(cos, 0, idx)  # both layers

    Legal because both nodes apply the same op, one that writes nothing and draws no random numbers, to the same nodes and
    constants; because between them nothing writes to the memory of what they read, not even through a view, and no region
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
