"""Removing what a rewrite left without readers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .emit import drop_dead_code

__all__ = ["DropDeadCode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DropDeadCode:
    """Removes nodes that nothing reads.

    Before::

        linear = aten.linear.default(norm, weight)  # its readers now read y0
        add = aten.add.Tensor(x, y0)

    After::

        add = aten.add.Tensor(x, y0)

    Legal because removed nodes are functional: in-place ops (the writes to feature state), graph inputs and the output
    stay. This is where a cached step saves its work: attention and FFN of a rewritten branch have no readers left.
    """

    name: str = "drop_dead_code"

    def apply(self, gm: fx.GraphModule) -> int:
        return drop_dead_code(gm.graph)
