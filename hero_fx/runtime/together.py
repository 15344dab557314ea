"""The step graph of several requests, run on theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hero_fx.passes.slots import StateSlot

from .lane_state import LaneState, Stack
from .rows import Rows
from .stepper import Stepper
from .steps import BatchedStep, Placed

__all__ = ["in_order", "together"]


def in_order(placed: Sequence[Placed], part: Sequence[int]) -> list[int]:
    """The requests of a part, in the order of their stack's rows if they have one to themselves."""
    numbers = {placed[i].state: i for i in part}
    stack = placed[part[0]].state.stack
    if stack is not None and stack.whole and set(stack.left) == numbers.keys():
        return [numbers[lane] for lane in stack.left]
    return list(part)


def together(
    stepper: Stepper, step: BatchedStep, placed: Sequence[Placed], part: Sequence[int], bucket: int, rows: Rows
) -> list[tuple[Tensor, ...]]:
    """The outputs of each request of a part; the rest of the bucket repeats the last one, and is left out.

    Where they fill the bucket, their state is one stack from now on. Otherwise it is gathered, and what is written copied back.
    """
    padded = [*part, *[part[-1]] * (bucket - len(part))]
    lanes = [placed[i].state for i in padded]
    filled = len(part) == bucket
    state = _stack_of(step, lanes).tensors if filled else _gathered(step, lanes)
    device = step.step.device
    extra: list[Any] = [
        state[slot]
        if isinstance(slot, StateSlot)
        else torch.stack([stepper.fill(slot, placed[i], device) for i in padded])
        for slot in step.step.slots
    ]
    outputs = step.step.run(*rows.together(padded), *extra)
    if not filled:
        for slot in step.written:
            for row, lane in enumerate(lanes[: len(part)]):
                lane.tensors[slot].copy_(state[slot][row])
    return [tuple(output[row] for output in outputs) for row in range(len(part))]


def _stack_of(step: BatchedStep, lanes: Sequence[LaneState]) -> Stack:
    """The stack whose rows are the state of these lanes: the one that they have, or a new one."""
    stack = lanes[0].stack
    if stack is not None and stack.whole and stack.left == lanes:
        return stack
    return Stack(_gathered(step, lanes, of_all=True), lanes)


def _gathered(step: BatchedStep, lanes: Sequence[LaneState], *, of_all: bool = False) -> dict[StateSlot, Tensor]:
    """State [lanes, ...] of the slots that a step has (`of_all`: of every slot), in new tensors. What it only overwrites is
    not copied."""
    found = {}
    with torch.inference_mode(False):  # a stack outlives the call
        for slot, tensor in lanes[0].tensors.items():
            if slot in step.written - step.read:
                found[slot] = tensor.new_empty((len(lanes), *tensor.shape))
            elif of_all or slot in step.read:
                found[slot] = torch.stack([lane.tensors[slot] for lane in lanes])
    return found
