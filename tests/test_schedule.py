"""Schedules against the lists of shared/method.md (recovered from the paper's tables) and their own rules."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hero_fx.schedule import Explicit, Schedule, Toca, Uniform, full_steps, make_schedule

T50_N2 = "0 1 2 3 6 9 12 14 16 18 20 22 24 26 28 30 32 34 36 38 40 42 44 46 47 48 49"
T50_N3 = "0 1 2 5 8 12 14 16 18 20 21 24 27 30 33 36 39 40 42 44 46 48 49"
T30_N3 = "0 1 2 5 8 10 12 15 18 21 24 26 28 29"


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize(("steps", "interval", "expected"), [(50, 2, T50_N2), (50, 3, T50_N3), (30, 3, T30_N3)])
def test_toca_lists(steps: int, interval: int, expected: str) -> None:
    assert full_steps(Toca(interval=interval, num_steps=steps)) == numbers(expected)


@pytest.mark.parametrize(("steps", "interval", "count"), [(50, 2, 27), (50, 3, 23), (30, 2, 17), (30, 3, 14)])
def test_toca_counts_are_those_of_the_paper(steps: int, interval: int, count: int) -> None:
    assert len(full_steps(Toca(interval=interval, num_steps=steps))) == count


@pytest.mark.parametrize(("interval", "expected"), [(1, "0 1 2 3 4 5 6 7 8"), (2, "0 1 2 4 6 8"), (3, "0 1 2 5 8")])
def test_uniform_without_a_length(interval: int, expected: str) -> None:
    assert full_steps(Uniform(interval=interval), 9) == numbers(expected)


@pytest.mark.parametrize(("steps", "count"), [(50, 27), (30, 17)])
def test_uniform_counts_of_fora_and_taylorseer(steps: int, count: int) -> None:
    assert len(full_steps(Uniform(interval=2, num_steps=steps))) == count


def test_uniform_cooldown() -> None:
    assert full_steps(Uniform(interval=4, warmup=1, cooldown=0, num_steps=11)) == [0, 4, 8]
    assert full_steps(Uniform(interval=4, warmup=1, cooldown=1, num_steps=11)) == [0, 4, 8, 10]
    assert full_steps(Uniform(interval=4, warmup=1, cooldown=3, num_steps=11)) == [0, 4, 8, 9, 10]
    assert full_steps(Uniform(interval=9, warmup=3, cooldown=1, num_steps=2)) == [0, 1]  # a distilled model


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 9),
    st.one_of(st.none(), st.integers(1, 40)),
    st.integers(0, 39),
)
def test_uniform_rules(interval: int, warmup: int, cooldown: int, num_steps: int | None, step: int) -> None:
    cooldown = min(cooldown, 1) if num_steps is None else cooldown
    step = step if num_steps is None else step % num_steps
    schedule = Uniform(interval=interval, warmup=warmup, cooldown=cooldown, num_steps=num_steps)
    last = num_steps is not None and num_steps - step <= cooldown
    on_grid = step in range(warmup - 1, 40, interval)
    assert schedule.is_full(step) == (step < warmup or last or on_grid)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 80))
def test_toca_ends_are_full(interval: int, steps: int) -> None:
    full = full_steps(Toca(interval=interval, num_steps=steps))
    assert set(full) >= {step for step in (0, 1, 2, steps - 1) if step < steps}


def make(schedule: object = "uniform", num_steps: int | None = None, **changes: int) -> Schedule:
    arguments = {"interval": 2, "warmup": 3, "cooldown": 1} | changes
    return make_schedule(schedule, num_steps=num_steps, **arguments)  # type: ignore[arg-type]


def test_make_schedule() -> None:
    assert make() == Uniform(interval=2, warmup=3, cooldown=1, num_steps=None)
    assert make(num_steps=7, warmup=1, cooldown=2) == Uniform(interval=2, warmup=1, cooldown=2, num_steps=7)
    assert make("toca", 50) == Toca(interval=2, num_steps=50)
    explicit = Explicit(mask=(True, False, True))
    assert make([1, 0, 1]) == make((True, False, True), 3) == make(torch.tensor([True, False, True])) == explicit
    assert all(isinstance(schedule, Schedule) for schedule in (make(), make("toca", 50), explicit))


def test_schedules_are_values() -> None:
    assert hash(make("toca", 50)) == hash(make("toca", 50))
    assert repr(Toca(interval=2, num_steps=4)) == "Toca(interval=2, num_steps=4)"


@pytest.mark.parametrize("schedule", [make(num_steps=4), make("toca", 4), make([1, 0, 0, 1])])
def test_more_steps_than_the_schedule_has(schedule: Schedule) -> None:
    assert schedule.num_steps == 4
    assert schedule.is_full(3)
    with pytest.raises(ValueError, match=r"step=4, but the schedule has 4 steps.*Pass the num_steps"):
        schedule.is_full(4)
    with pytest.raises(ValueError, match=r"step=-1 is negative"):
        schedule.is_full(-1)


@pytest.mark.parametrize(
    ("schedule", "num_steps", "changes", "message"),
    [
        ("cosine", None, {}, 'schedule=\'cosine\' is unknown; allowed: "uniform", "toca"'),
        (3, None, {}, "schedule=3 is not a schedule"),
        ("toca", None, {}, 'schedule="toca" needs num_steps'),
        ("toca", 0, {}, "num_steps=0"),
        ("toca", 9, {"interval": 0}, "interval=0"),
        ("uniform", None, {"interval": 0}, "interval=0 must be a whole number of at least 1"),
        ("uniform", None, {"interval": True}, "interval=True"),
        ("uniform", None, {"interval": 2.0}, "interval=2.0"),
        ("uniform", None, {"warmup": 0}, "warmup=0"),
        ("uniform", None, {"cooldown": -1}, "cooldown=-1"),
        ("uniform", None, {"cooldown": 2}, "cooldown=2 needs num_steps"),
        ("uniform", 0, {}, "num_steps=0"),
        ([], None, {}, "is empty"),
        ([0, 1, 2], None, {}, "schedule[2]=2 is not a truth value"),
        ([True, "no"], None, {}, "schedule[1]='no' is not a truth value"),
        (torch.ones(2, 2), None, {}, "schedule[0]=tensor([1., 1.]) is not a truth value"),
        ([False, True], None, {}, "schedule=(0, 1) starts with a step that is not full"),
        ([0] * 9, None, {}, "schedule=(0, 0, 0, 0, 0, 0, ...) starts"),
        ([True, False], 3, {}, "num_steps=3 but schedule= has 2 values"),
    ],
)
def test_errors(schedule: object, num_steps: int | None, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(schedule, num_steps, **changes)


def test_full_steps_needs_a_length() -> None:
    with pytest.raises(ValueError, match="num_steps=None"):
        full_steps(make())
