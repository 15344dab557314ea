"""Calibration of plans whose parts of the batch have full steps of their own, and of schedules that are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hero_fx
from hero_fx.calibration.choose import _starts as starts_of
from hero_fx.calibration.record import Recording
from hero_fx.calibration.samples import Track
from hero_fx.calibration.search import improve, thinned
from hero_fx.calibration.tables import Outputs
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Plan, Timeline

from .support import tiny
from .support.forecasts import Conditioned, theta, times
from .support.steps_by_hand import numbers

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_parts_are_moved_one_at_a_time() -> None:
    wanted = (2, 0, 1, 1, 0, 2)
    seen: list[tuple[int, ...]] = []

    def objective(schedule: tuple[int, ...]) -> float:
        seen.append(schedule)
        return sum(abs(a - b) for a, b in zip(schedule, wanted, strict=True))

    assert improve([(2, 2, 2, 0, 0, 0)], objective, evaluations=500, seed=0, parts=2) == (wanted, 0)
    assert all(sum(schedule) == 6 and schedule[0] == 2 and max(schedule) <= 2 for schedule in seen)


def test_fewer_full_steps_are_some_of_those_there_are() -> None:
    late = [0.0] * 6 + [1.0] * 4
    full = tuple(step in (0, 1, 3, 5, 6, 7, 8, 9) for step in range(10))
    found = thinned(full, late, 4)
    assert sum(found) == 4
    assert found[0]
    assert found[9]
    assert [step for step, own in enumerate(found) if own and step not in (0, 9)] == [6, 8]


class Guided(nn.Module):
    """Two rows that follow the time at different speeds: the second has to be looked at more often."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        rate = torch.tensor([1.0, 9.0])[:, None, None, None]
        return torch.sin(rate * timestep.float()[:, None, None, None] / 1000) * torch.cos(sample)


def test_calibration_finds_which_part_needs_more_full_steps() -> None:
    model = Guided().eval()

    def run(call: Any, i: int) -> Tensor:
        sample = numbers(1, 3, 4, 4, seed=i)
        for time in tiny.timesteps(12):
            without, having = call(torch.cat([sample] * 2), time.expand(2)).chunk(2)
            sample = sample - (without + 3 * (having - without)) / 12
        return sample

    options: dict[str, Any] = {"num_steps": 12, "budget": 5, "scenes": 2, "holdout": 1, "search": 60, "inner": "eager"}
    halves: dict[str, Any] = {"by": ("batch",)}
    together = hero_fx.calibrate(model, run, **options, **halves)
    found = hero_fx.calibrate(model, run, apart=True, **options)
    (line,) = found.plan.timelines
    assert found.plan.parts == 2
    assert sum(line.parts[0]) + sum(line.parts[1]) == 2 * 5
    assert sum(line.parts[1]) > sum(line.parts[0])
    assert found.candidates[0].error["sample"] < 0.8 * together.candidates[0].error["sample"]
    assert "in part" in str(found)


@pytest.mark.parametrize("full", range(4, 16))
def test_any_number_of_full_steps_has_a_start(full: int) -> None:
    gains = torch.linspace(0, 1, 8)[:, None, None] * torch.tensor([0.1, 1.0])
    gram = {"out0": torch.eye(16).expand(1, 2, 1, 3, 16, 16)}
    recording = Recording(tuple(map(float, range(8, 0, -1))), gram, {}, gains, Track({}, {}))
    outputs = Outputs((recording,), (OutputRule(index=0, axis=1, groups=2, latent="x"),), (4,), apart=True)
    job: Any = SimpleNamespace(parts=2, timesteps=recording.timesteps, must=frozenset({0, 3}))
    for start in starts_of(job, outputs, full):
        assert sum(start) == full
        assert start[0] == start[3] == 2
        assert max(start) <= 2


def test_calibration_refuses_what_has_no_parts() -> None:
    def run(call: Any, i: int) -> Tensor:
        sample = numbers(1, 3, 4, 4, seed=i)
        for time in tiny.timesteps(4):
            sample = sample - call(sample, time.expand(1)) / 4
        return sample

    with pytest.raises(ValueError, match=r"apart=True: the model is called with a batch of 1"):
        hero_fx.calibrate(
            Conditioned().eval(), run, num_steps=4, budget=2, scenes=1, holdout=1, apart=True, inner="eager"
        )
    with pytest.raises(ValueError, match=r"apart=True: is for policies=\('forecast',\)"):
        hero_fx.calibrate(Conditioned(), run, num_steps=4, budget=2, policies=("hero",), apart=True)


def test_a_schedule_that_is_given_is_kept() -> None:
    def run(call: Any, i: int) -> Tensor:
        sample = numbers(2, 3, 4, 4, seed=i)
        for time in tiny.timesteps(4):
            sample = sample - call(sample, time.expand(2)) / 4
        return sample

    options: dict[str, Any] = {"num_steps": 4, "scenes": 1, "holdout": 1, "search": 1, "inner": "eager"}
    model = Conditioned().eval()
    line = Timeline(
        schedule=(True, False, False, True), timesteps=times(4), coefficients={"out0": theta(1, 3, 1, 1, steps=4)}
    )
    start = Plan(policy="forecast", timelines=(line,), outputs=(OutputRule(index=0, axis=1),))
    found = hero_fx.calibrate(model, run, budget=2, start=start, **options)
    assert found.plan.timelines[0].schedule == line.schedule
    with pytest.raises(ValueError, match=r"start: the plan has 2 full steps, and budget=3"):
        hero_fx.calibrate(model, run, budget=3, start=start, **options)
    with pytest.raises(ValueError, match=r"start: the plan has 2 full steps, and budget=1.3 allows"):
        hero_fx.calibrate(model, run, budget=1.3, start=start, **options)
    with pytest.raises(ValueError, match=r"start: the plan has 1 part\(s\) .* the calibration is for 2 and 1"):
        hero_fx.calibrate(model, run, budget=2, start=start, apart=True, **options)
