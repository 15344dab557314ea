"""What our passes cost by depth, counted in lines of ours that run: a test of time would be one of the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import Any

import torch

import hero_fx

from .support.toys import GRID, latents, toy
from .support.tracing import capture


def lines_run(work: Callable[[], hero_fx.StepGraphs]) -> tuple[int, hero_fx.StepGraphs]:
    """Lines of hero_fx that run, each as often as it does, and the step graphs that they make."""
    count = 0

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line if frame.f_globals.get("__name__", "").startswith("hero_fx.") else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        with torch.no_grad():
            steps = work()
    finally:
        sys.settrace(before)
    return count, steps


@cache
def traced(layers: int) -> tuple[int, hero_fx.StepGraphs]:
    """From Dynamo's graph of a toy to step graphs."""
    gm, inputs = capture(toy(layers), latents(), torch.tensor([900.0, 900.0]))
    return lines_run(lambda: hero_fx.backend(grid=GRID, unsampled="extrapolate").trace(gm, inputs))


def rewritten(layers: int, **options: Any) -> int:
    """Lines from a traced toy to step graphs with these options."""
    _, steps = traced(layers)
    assert steps.structure.depth == layers
    return lines_run(lambda: hero_fx.backend(grid=GRID, **options).rewrite(steps))[0]


def is_linear(lines: Callable[[int], int]) -> bool:
    small, middle, large = map(lines, (4, 8, 16))
    # Exactly twice but for the finder, which looks back at all residual adds for each; one walk over the graph for every
    # branch gives 2.1 or more.
    return large - middle < 2.05 * (middle - small)


def test_twice_the_layers_are_twice_the_work() -> None:
    assert is_linear(lambda layers: traced(layers)[0])


def test_of_tokens_chosen_by_score_too() -> None:
    """The literal form and other policies run no pass that these two do not."""
    assert is_linear(lambda layers: rewritten(layers, policy="duca"))
