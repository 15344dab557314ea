"""`hero_fx.stages`: the lists of passes, and leaving passes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.stages import OPTIONAL

from .support import toys

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TIMES = toys.times(7)
OPTIONS: dict[str, Any] = {"patch": (1, 1, 5), "unsampled": "reuse"}
"""With these, all passes of the algebra find something in a toy."""


@pytest.fixture(scope="module")
def everything() -> list[Tensor]:
    """A trajectory with all passes."""
    return run(inner="aot_eager")[0]


def run(**options: Any) -> tuple[list[Tensor], hero_fx.StepGraphs]:
    call, backend = toys.compiled(**OPTIONS, **options)
    return toys.loop(call, toys.latents(), TIMES), backend.graphs[-1]


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_a_pass_that_is_left_out(name: str, everything: list[Tensor]) -> None:
    outputs, steps = run(disable_passes=(name,))
    assert name not in {record.name for record in steps.records}
    torch.testing.assert_close(outputs, everything, rtol=1e-4, atol=1e-5)


def test_all_passes_left_out(everything: list[Tensor]) -> None:
    outputs, steps = run(disable_passes=sorted(OPTIONAL), inner="aot_eager")
    assert OPTIONAL.isdisjoint(record.name for record in steps.records)
    torch.testing.assert_close(outputs, everything, rtol=1e-4, atol=1e-5)


def test_each_pass_that_can_be_left_out_would_run() -> None:
    assert {record.name for record in run()[1].records} >= OPTIONAL
