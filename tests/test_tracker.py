"""The tracker against an oracle that is told what the loop does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hero_fx.runtime.evidence import Evidence
from hero_fx.runtime.timestep import Timestep
from hero_fx.runtime.tracker import Call, Tracker
from hero_fx.schedule import Explicit, Schedule, Toca, Uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A call as the loop makes it, and where it stands by construction."""

    timestep: tuple[float, ...]
    name: str | None = None
    step_index: int | None = None
    trajectory: int
    step: int
    lane: int | str


def oracle(calls: list[Made], schedule: Schedule) -> list[Call]:
    """What each call must be, from the whole past of its lane, searched from the start each time."""
    expected: list[Call] = []
    for made in calls:
        past = [c for c in expected if (c.trajectory, c.lane) == (made.trajectory, made.lane)]
        fulls = [c.step for c in past if c.full]
        full = not fulls or any(schedule.is_full(s) for s in range(fulls[-1] + 1, made.step + 1))
        ends = [*fulls, made.step] if full else fulls
        expected.append(
            Call(
                step=made.step,
                lane=made.lane,
                full=full,
                since_full=0 if full else made.step - fulls[-1],
                gap=ends[-1] - ends[-2] if len(ends) > 1 else 0,
                fulls=len(fulls),
                new_trajectory=all(c.trajectory != made.trajectory for c in expected),
                trajectory=made.trajectory,
            )
        )
    return expected


def advance(
    tracker: Tracker, timestep: float | tuple[float, ...], name: str | None = None, step_index: int | None = None
) -> Call:
    values = tuple(map(float, timestep)) if isinstance(timestep, tuple) else (float(timestep),)
    return tracker.advance(Evidence(timestep=Timestep(values), name=name, step_index=step_index))


def run(calls: list[Made], schedule: Schedule) -> list[Call]:
    tracker = Tracker(schedule)
    return [advance(tracker, c.timestep, c.name, c.step_index) for c in calls]


@st.composite
def timesteps(draw: st.DrawFn, steps: int, ascending: bool, floor: float | None, kind: str) -> list[float]:
    """Strictly monotone; if `floor` is given the first one lies beyond it, against the direction of travel."""
    if kind == "int":
        gaps = draw(st.lists(st.integers(1, 50), min_size=steps, max_size=steps))
    else:
        gaps = draw(st.lists(st.integers(1, 2**20), min_size=steps, max_size=steps))
    scale = {"int": 1.0, "float": 2.0**-10, "scaled": 2.0**-24}[kind]
    start = 0 if floor is None else round(floor / scale)
    rising = [start + sum(gaps[: i + 1]) for i in range(steps)]
    if ascending:  # start below the last one of the trajectory before
        rising = [start - sum(gaps[i:]) for i in range(steps)]
    return [value * scale for value in (rising if ascending else rising[::-1])]


@st.composite
def loops(draw: st.DrawFn) -> tuple[list[Made], Schedule]:
    """Several trajectories in a row, one to three lanes, some late, some with gaps, some named."""
    num_steps = draw(st.none() | st.integers(2, 12))
    interval, warmup = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    schedule: Schedule = Uniform(interval=interval, warmup=warmup, num_steps=num_steps)
    if num_steps is not None and draw(st.booleans()):
        rest = draw(st.lists(st.booleans(), min_size=num_steps - 1, max_size=num_steps - 1))
        toca = draw(st.booleans())
        schedule = Toca(interval=interval, num_steps=num_steps) if toca else Explicit(mask=(True, *rest))
    kind = draw(st.sampled_from(["int", "float", "scaled"]))
    ascending = draw(st.booleans())
    named = draw(st.booleans())
    still = draw(st.none() | st.just(0.0) | st.integers(0, 100).map(float))  # timestep of conditioning tokens
    calls: list[Made] = []
    last: float | None = None
    for trajectory in range(1, draw(st.integers(1, 4)) + 1):
        steps = draw(st.integers(2, num_steps or 12))
        values = draw(timesteps(steps, ascending, last, kind))
        same = draw(st.integers(1, 3))  # without names, calls that come and go are refused
        for step, value in enumerate(values):
            timestep = (value, value) if still is None else (min(value, still), max(value, still))
            count = draw(st.integers(1, 3)) if named else same
            names = draw(st.permutations(["cond", "uncond", "third"]))
            for lane in range(count):
                name = names[lane] if named else None
                calls.append(
                    Made(
                        timestep=timestep,
                        name=name,
                        trajectory=trajectory,
                        step=step,
                        lane=lane if name is None else name,
                    )
                )
        last = values[-1]
    return calls, schedule


@settings(deadline=None)
@given(loops())
def test_generated_loops(made: tuple[list[Made], Schedule]) -> None:
    assert run(*made) == oracle(*made)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.lists(st.booleans(), min_size=1, max_size=5), st.booleans())
def test_known_length_tells_trajectories_apart(interval: int, steps: int, rising: list[bool], named: bool) -> None:
    schedule = Uniform(interval=interval, num_steps=steps)
    calls: list[Made] = []
    for trajectory, ascending in enumerate(rising, 1):
        # Where one ends the next may begin on either side, and may then travel either way.
        start = 2 * trajectory
        values = range(start, start + steps) if ascending else range(start + steps, start, -1)
        if not named and calls and calls[-1].timestep[0] == values[0]:
            values = range(100, 100 + steps)  # without a name the same timestep is another lane
        for step, value in enumerate(values):
            for lane, name in enumerate(["cond", "uncond"]):
                calls.append(
                    Made(
                        timestep=(value, value),
                        name=name if named else None,
                        trajectory=trajectory,
                        step=step,
                        lane=name if named else lane,
                    )
                )
    assert run(calls, schedule) == oracle(calls, schedule)


@st.composite
def heun_loops(draw: st.DrawFn) -> list[Made]:
    """Named lanes and timesteps that come once or twice."""
    calls: list[Made] = []
    repeats = draw(st.lists(st.booleans(), min_size=2, max_size=8))
    step = 0
    for index, repeat in enumerate(repeats):
        for again in range(1 + repeat):
            # Only a name that was seen at this timestep tells that a second evaluation begins.
            first = draw(st.sampled_from([c.lane for c in calls if c.step == step - 1] if again else ["a", "b"]))
            others = draw(st.lists(st.sampled_from(["a", "b", "c"]), unique=True, max_size=2))
            for lane in [first, *(name for name in others if name != first)]:
                assert isinstance(lane, str)
                calls.append(Made(timestep=(-index, -index), name=lane, trajectory=1, step=step, lane=lane))
            step += 1
    return calls


@settings(deadline=None)
@given(heun_loops(), st.integers(1, 4))
def test_solvers_that_evaluate_a_timestep_twice(calls: list[Made], interval: int) -> None:
    schedule = Uniform(interval=interval, warmup=1)
    assert run(calls, schedule) == oracle(calls, schedule)


@st.composite
def indexed_loops(draw: st.DrawFn) -> list[Made]:
    """Step indices that skip, start anywhere and start over; the timesteps are noise and must not matter."""
    calls: list[Made] = []
    start, names = draw(st.integers(0, 5)), ["a"]
    for trajectory in range(1, draw(st.integers(1, 4)) + 1):
        step = start
        for index in range(draw(st.integers(1, 6))):
            if index > 0:
                step += draw(st.integers(1, 4))
            # An index that comes again starts over only with a name that it had before.
            first = draw(st.sampled_from(names if index == 0 else ["a", "b", "c"]))
            others = draw(st.lists(st.sampled_from(["a", "b", "c"]), unique=True))
            names = [first, *(name for name in others if name != first)]
            for name in names:
                value = float(draw(st.integers(-3, 3)))
                calls.append(
                    Made(
                        timestep=(value, value),
                        name=name,
                        step_index=step,
                        trajectory=trajectory,
                        step=step,
                        lane=name,
                    )
                )
        start = draw(st.just(step) | st.integers(0, step))
    return calls


@settings(deadline=None)
@given(indexed_loops(), st.integers(1, 4), st.integers(1, 3))
def test_step_index_wins(calls: list[Made], interval: int, warmup: int) -> None:
    schedule = Uniform(interval=interval, warmup=warmup)
    assert run(calls, schedule) == oracle(calls, schedule)


def drive(tracker: Tracker, *values: float, name: str | None = None) -> list[Call]:
    return [advance(tracker, value, name) for value in values]


def test_two_calls_a_step() -> None:
    calls = drive(Tracker(Uniform(interval=2, warmup=1)), 9, 9, 8, 8, 7, 7, 9, 9)
    assert [(c.step, c.lane) for c in calls] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
        (0, 0),
        (0, 1),
    ]
    assert [c.full for c in calls] == [True, True, False, False, True, True, True, True]
    assert [c.new_trajectory for c in calls] == [True, *[False] * 5, True, False]
    assert [c.trajectory for c in calls] == [1] * 6 + [2] * 2


def test_distances_are_real() -> None:
    calls = drive(Tracker(Explicit(mask=(True, False, True, False, False, True, False))), *range(7))
    assert [c.since_full for c in calls] == [0, 1, 0, 1, 2, 0, 1]
    assert [c.gap for c in calls] == [0, 0, 2, 2, 2, 3, 3]
    assert [c.fulls for c in calls] == [0, 1, 1, 2, 2, 2, 3]


def test_a_lane_makes_up_what_it_missed() -> None:
    tracker = Tracker(Uniform(interval=3, warmup=1))  # full: 0 3 6
    calls = {}
    for step in range(8):
        drive(tracker, step, name="cond")
        if step in (1, 2, 4, 5, 7):
            calls[step] = advance(tracker, step, "late")
    assert [step for step, call in calls.items() if call.full] == [1, 4, 7]
    assert (calls[5].since_full, calls[5].gap, calls[5].fulls) == (1, 3, 2)


def test_conditioning_tokens_stand_still() -> None:
    tracker = Tracker(Uniform(interval=2))
    steps = [advance(tracker, t).step for t in [(0, 900), (0, 500), (0, 100), (0, 900), (0, 500)]]
    assert steps == [0, 1, 2, 0, 1]


def test_direction_outlasts_steps_that_do_not_show_it() -> None:
    tracker = Tracker(Uniform(interval=2))
    repeated = drive(tracker, 9, 8, 8, 9, 8, name="cond")
    assert [(c.trajectory, c.step) for c in repeated] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    tracker.reset()
    apart = [advance(tracker, t) for t in [(2, 4), (1, 4), (0, 5), (1, 5), (0, 5)]]
    assert [(c.trajectory, c.step) for c in apart] == [(3, 0), (3, 1), (3, 2), (4, 0), (4, 1)]


def test_one_step_trajectories_with_names() -> None:
    tracker = Tracker(Uniform(interval=2, num_steps=1))
    calls = [advance(tracker, 5, name) for name in ("cond", "uncond", "cond", "uncond")]
    assert [(c.trajectory, c.step, c.lane) for c in calls] == [
        (1, 0, "cond"),
        (1, 0, "uncond"),
        (2, 0, "cond"),
        (2, 0, "uncond"),
    ]


def test_same_step_index_with_the_same_name_starts_over() -> None:
    tracker = Tracker(Uniform(interval=2))
    calls = [advance(tracker, 5, "cond", i) for i in (3, 5, 5)]
    assert [(c.trajectory, c.step) for c in calls] == [(1, 3), (1, 5), (2, 5)]
    unnamed = [advance(tracker, 5, None, 5) for _ in range(2)]
    assert [(c.trajectory, c.step, c.lane) for c in unnamed] == [(2, 5, 0), (2, 5, 1)]


def test_reset_forgets_the_trajectory_and_keeps_the_count() -> None:
    tracker = Tracker(Uniform(interval=9, warmup=1))
    drive(tracker, 3, 2)
    tracker.reset()
    call = advance(tracker, 1)
    assert call == Call(step=0, lane=0, full=True, since_full=0, gap=0, fulls=0, new_trajectory=True, trajectory=2)


def test_calls_that_never_change_the_timestep() -> None:
    tracker = Tracker(Uniform(interval=2), max_lanes=3)
    drive(tracker, 5, 5, 5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"4 calls in a row.*hero_fx\.reset.*hero_fx\.session.*cache_context"):
            advance(tracker, 5)
    assert advance(tracker, 4).step == 1


def test_names_that_never_come_again() -> None:
    tracker = Tracker(Uniform(interval=2), max_lanes=3)
    for index in range(3):
        advance(tracker, index, f"step {index}")
    with pytest.raises(RuntimeError, match=r"name='step 3' would be lane 4.*the same few names"):
        advance(tracker, 3, "step 3")


def test_an_error_leaves_the_guard_as_it_was() -> None:
    tracker = Tracker(Uniform(interval=2, num_steps=3))
    advance(tracker, 9, "cond", 1)
    with pytest.raises(ValueError, match="step_index=-1 is negative"):
        advance(tracker, 9, None, -1)
    with pytest.raises(ValueError, match="step=3, but the schedule has 3 steps"):
        advance(tracker, 9, "cond", 3)
    assert advance(tracker, 9, "uncond").step == 1
    with pytest.raises(ValueError, match="max_lanes=0"):
        Tracker(Uniform(interval=2), max_lanes=0)


def test_scheduled_steps_are_asked_for_once_a_call() -> None:
    asked: Counter[int] = Counter()

    class Counting:
        num_steps = None

        def is_full(self, step: int) -> bool:
            asked[step] += 1
            return step == 0

    drive(Tracker(Counting()), *range(40))
    assert asked == Counter(range(40))
