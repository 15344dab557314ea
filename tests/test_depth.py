"""What our passes cost by depth, counted in lines of ours that run: a test of time would be one of the machine."""

from __future__ import annotations

import sys
from functools import cache
from types import FrameType
from typing import Any

import pytest
import torch
from torch import fx

import hero_fx

from .support.toys import GRID, latents, toy
from .support.tracing import capture


@cache
def dynamo_graph(layers: int) -> tuple[fx.GraphModule, list[Any]]:
    return capture(toy(layers), latents(), torch.tensor([900.0, 900.0]))


def lines_run(layers: int, **options: Any) -> int:
    """Lines of hero_fx that run, each as often as it does, from Dynamo's graph of a toy to its step graphs."""
    gm, inputs = dynamo_graph(layers)
    backend = hero_fx.backend(grid=GRID, **options)
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
            steps = backend.trace(gm, inputs)
    finally:
        sys.settrace(before)
    assert steps.structure.depth == layers
    return count


@pytest.mark.parametrize(
    "options",
    [
        {"unsampled": "extrapolate", "cache_point": "post_gate"},
        {"policy": "duca"},
        {"form": "literal"},
    ],
    ids=["extrapolate", "duca", "literal"],
)
def test_twice_the_layers_are_twice_the_work(options: dict[str, Any]) -> None:
    small, middle, large = (lines_run(layers, **options) for layers in (4, 8, 16))
    # Exactly twice but for the finder, which looks back at all residual adds for each; one walk over the graph for every
    # branch gives 2.1 or more.
    assert large - middle < 2.05 * (middle - small)
