"""`hero_fx.stages`: the lists of passes, and leaving passes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.stages import OPTIONAL

from .support import tiny, toys
from .support.tracing import Traced

TIMES = toys.times(7)
OPTIONS: dict[str, Any] = {"patch": (1, 1, 5), "unsampled": "reuse"}
"""With these, all passes of the algebra find something in a toy."""


Run = Callable[..., tuple[list[Tensor], hero_fx.StepGraphs]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """A trajectory with other options, of a toy that is traced once."""
    torch._dynamo.reset()
    traced = Traced(toys.toy(), toys.latents(), TIMES[0])

    def outputs(**options: Any) -> tuple[list[Tensor], hero_fx.StepGraphs]:
        backend = hero_fx.backend(**{"inner": tiny.INNER, "grid": toys.GRID, "warmup": 2, **OPTIONS, **options})
        call = traced.by(backend)
        return toys.loop(call, toys.latents(), TIMES), backend.graphs[-1]

    yield outputs
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def everything(run: Run) -> list[Tensor]:
    """A trajectory with all passes."""
    return run(inner="aot_eager")[0]


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_a_pass_that_is_left_out(name: str, run: Run, everything: list[Tensor]) -> None:
    outputs, steps = run(disable_passes=(name,))
    assert name not in {record.name for record in steps.records}
    torch.testing.assert_close(outputs, everything, rtol=1e-4, atol=1e-5)


def test_all_passes_left_out(run: Run, everything: list[Tensor]) -> None:
    outputs, steps = run(disable_passes=sorted(OPTIONAL), inner="aot_eager")
    assert OPTIONAL.isdisjoint(record.name for record in steps.records)
    torch.testing.assert_close(outputs, everything, rtol=1e-4, atol=1e-5)


def test_each_pass_that_can_be_left_out_would_run(run: Run) -> None:
    assert {record.name for record in run()[1].records} >= OPTIONAL
