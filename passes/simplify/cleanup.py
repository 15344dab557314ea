"""Removing what a rewrite left without readers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from hero_fx.passes.emit import drop_dead_code
from hero_fx.passes.ops import writes
from hero_fx.passes.slots import StateSlot, slots_of

__all__ = ["DropDeadCode", "DropUnreadState", "is_write", "state_read"]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class DropUnreadState:
    """Stops recording state that no cached step reads, and drops inputs that nothing uses.

    Before (`read` does not hold y0; in CogVideoX the text stream ends with its last attention, so a cached step that
    does not attend to text never needs its features)::

        add = aten.add.Tensor(x, linear)
        copy_ = aten.copy_.default(y0, linear)

    After::

        add = aten.add.Tensor(x, linear)

    Legal because feature state is private to the step graphs: what none of them reads has no effect.
    """

    read: frozenset[StateSlot]
    name: str = "drop_unread_state"

    def apply(self, gm: fx.GraphModule) -> int:
        sites = 0
        for node, slot in list(slots_of(gm)):
            if isinstance(slot, StateSlot) and slot not in self.read:
                for write in [user for user in node.users if is_write(user, node)]:
                    gm.graph.erase_node(write)
                    sites += 1
        if sites:
            drop_dead_code(gm.graph)
        for node, _ in list(slots_of(gm)):
            if not node.users:
                gm.graph.erase_node(node)
                sites += 1
        return sites


def is_write(node: fx.Node, state: fx.Node) -> bool:
    """True if `node` writes to `state` and its result is not used."""
    return state in writes(node) and not node.users


def state_read(full: fx.GraphModule, cached: Iterable[fx.GraphModule]) -> frozenset[StateSlot]:
    """The state that some cached step reads, or that a full step needs to record it (what is only written does not count)."""
    read = {
        slot
        for gm in cached
        for node, slot in slots_of(gm)
        if isinstance(slot, StateSlot) and any(not is_write(user, node) for user in node.users)
    }
    feeds = {slot: set(_fed(node)) for node, slot in slots_of(full) if isinstance(slot, StateSlot)}
    while more := {slot for slot, into in feeds.items() if slot not in read and into & read}:
        read |= more
    return frozenset(read)


def _fed(state: fx.Node) -> Iterator[StateSlot]:
    """The other state that is written from what a full step reads of `state`."""
    waiting, seen = list(state.users), set()
    while waiting:
        node = waiting.pop()
        if node in seen or is_write(node, state):
            continue
        seen.add(node)
        waiting += node.users
        if not node.users:
            yield from (written.meta["slot"] for written in writes(node))
