"""What a step graph returns is the caller's: never feature state, which the next steps overwrite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.emit import Emitter
from hero_fx.passes.ops import writes
from hero_fx.passes.slots import StateSlot, slots_of

__all__ = ["OwnOutputs", "returned_state"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnOutputs:
    """Returns a copy of feature state where a rewrite has made state, or a view of it, an output.

    Before (the model returns the update of its last layer, and a cached step has put the cached one in its place)::

        add = aten.add.Tensor(x, y0)  # y0: feature state
        view = aten.select.int(y0, 0, 0)
        return (add, y0, view)

    After::

        clone = aten.clone.default(y0)
        add = aten.add.Tensor(x, y0)
        view = aten.select.int(clone, 0, 0)
        return (add, clone, view)

    Legal because the copy is made before anything writes to the state, so that it holds what its readers saw. There is one
    copy of each tensor: outputs that share memory in the model still do. Outputs that share memory with the model's inputs,
    or with nothing, are left alone.
    """

    name: str = "own_outputs"

    def apply(self, gm: fx.GraphModule) -> int:
        memory, emitter = Memory(gm.graph), Emitter(gm)
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        found = returned_state(gm, memory)
        for state in found:
            shown = set(memory.shown(state))
            readers = [user for user in state.users if user in shown or user is emitter.output]
            with emitter.before(first):
                copy = emitter.call(aten.clone.default, state)
            for user in readers:
                if state not in writes(user):
                    user.replace_input_with(state, copy)
        return len(found)


def returned_state(gm: fx.GraphModule, memory: Memory) -> list[fx.Node]:
    """The state inputs of a step graph whose memory its outputs may show."""
    return [node for node, slot in slots_of(gm) if isinstance(slot, StateSlot) and memory.returned(node)]
