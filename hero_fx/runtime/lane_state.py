"""Feature state of one lane, in tensors of its own or in rows of a stack.

Requests that are computed together, call after call, have their state in one stack: the step graph for several requests takes
it as it is, and nothing is copied in or out. A stack lasts as long as all of its lanes stay together. Where one leaves it, by
a call of its own, in another batch, or because its session is dropped, the others get tensors of their own again, so that no
memory is held for who is gone.

Whoever changes where a lane has its state holds the lock of the lane's trajectory. A step graph that writes to a stack runs
with the locks of all of its lanes held, so none can leave meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hero_fx.passes.slots import StateSlot

from .budget import Holder

__all__ = ["LaneState", "Stack"]


class LaneState:
    """The state tensors of one lane."""

    __slots__ = ("__weakref__", "_holder", "_stack", "_tensors")

    def __init__(self, tensors: dict[StateSlot, Tensor], holder: Holder | None = None) -> None:
        """`holder`: the lane's trajectory; None for state of one call, which enters no stack."""
        self._tensors = tensors
        self._holder = None if holder is None else weakref.ref(holder)
        self._stack: Stack | None = None

    @property
    def tensors(self) -> Mapping[StateSlot, Tensor]:
        """By slot."""
        return self._tensors

    @property
    def stack(self) -> Stack | None:
        """Where its tensors are rows, if they are."""
        return self._stack

    @property
    def nbytes(self) -> int:
        """Bytes held: of a stack, an equal share for each lane that is left in it."""
        stack = self._stack
        if stack is None:
            return sum(tensor.nbytes for tensor in self._tensors.values())
        return -(-stack.nbytes // max(1, len(stack.left)))

    def own(self) -> None:
        """Gives it tensors of its own."""
        if (stack := self._stack) is not None:
            with torch.inference_mode(False):
                self._tensors = {slot: tensor.clone() for slot, tensor in self._tensors.items()}
            self._stack = None
            stack.dissolve()

    def settle(self) -> None:
        """Gives it tensors of its own where others have left its stack.

        Where another stream of a GPU computes now than the one that the stack was made in, copies might come too early: then it
        is left to a later call.
        """
        if self._stack is not None and not self._stack.whole and self._stack.is_of_this_stream:
            self.own()

    def free(self) -> Stack | None:
        """Frees its tensors; returns the stack that it was in, which is to be dissolved."""
        stack, self._stack, self._tensors = self._stack, None, {}
        return stack

    def enter(self, stack: Stack, row: int) -> None:
        """Its state is a row of a stack from now on."""
        self._stack = stack
        self._tensors = {slot: tensor[row] for slot, tensor in stack.tensors.items()}

    def settle_if_idle(self) -> None:
        """The same as `settle`, unless a call of its trajectory runs, which will see to that."""
        holder = None if self._holder is None else self._holder()
        if holder is not None and holder.lock.acquire(blocking=False):
            try:
                if not holder.running:
                    self.settle()
            finally:
                holder.lock.release()


class Stack:
    """State of several lanes, one after the other along a first axis."""

    def __init__(self, tensors: Mapping[StateSlot, Tensor], lanes: Sequence[LaneState]) -> None:
        """`tensors`: [lanes, ...] of every slot; the lanes have their state in it from now on."""
        self.tensors = dict(tensors)
        self._lanes = tuple(map(weakref.ref, lanes))
        self._stream = self._current_stream()
        before = {lane.stack for lane in lanes} - {None}
        for row, lane in enumerate(lanes):
            lane.enter(self, row)
        for stack in before:
            assert stack is not None
            stack.dissolve()

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def left(self) -> list[LaneState]:
        """The lanes that are still in it, in the order of their rows."""
        return [lane for ref in self._lanes if (lane := ref()) is not None and lane.stack is self]

    @property
    def whole(self) -> bool:
        """Whether no lane has left."""
        return len(self.left) == len(self._lanes)

    def dissolve(self) -> None:
        """Gives all lanes tensors of their own, but those of which a call runs: they settle when it ends."""
        for lane in self.left:
            lane.settle_if_idle()

    @property
    def is_of_this_stream(self) -> bool:
        """Whether it was made in the stream of the GPU that computes now."""
        return self._stream == self._current_stream()

    def _current_stream(self) -> torch.Stream | None:
        device = next((tensor.device for tensor in self.tensors.values()), torch.device("cpu"))
        return None if device.type in ("cpu", "meta") else torch.accelerator.current_stream(device)
