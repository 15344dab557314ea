"""Choosing a schedule: the best one of so many full steps, or the one with the fewest that keeps within a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .evaluate import Evaluator, Job, log_sum
from .search import Schedule, even_schedule, improve, pairs, seed_schedule, thinned
from .tables import Outputs, Predictor

__all__ = ["Bound", "OutOfBound", "best", "bound_of", "fewest"]

SHARES = (0.6, 0.45, 1.0)
"""Of the full steps that all parts of the batch would have alike, how many those parts start with that have fewer."""
POWERS = (2.0, 1.0, 0.0)
"""Of how far a step moves the sample, as weight of its error: errors of early steps grow on their way, so none is best."""


class OutOfBound(Exception):
    """Even the largest number of full steps leads too far from full compute; the message says how far."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest distances to full compute that are allowed, by name; those that are not named may be any."""

    limits: Mapping[str, float]

    def excess(self, error: Mapping[str, float]) -> float:
        """The logarithm of the worst ratio of a distance to its limit: at most 0 where all are within."""
        return max(math.log(max(error[name], 1e-12) / limit) for name, limit in self.limits.items())

    def over(self, error: Mapping[str, float]) -> str:
        """The distances that are above their limits, in words; empty where none is."""
        return ", ".join(
            f"{name} is {error[name]:.3g} and may be {limit:.3g}"
            for name, limit in self.limits.items()
            if error[name] > limit
        )


def bound_of(max_error: float | Mapping[str, float], names: Mapping[str, float]) -> Bound:
    """The bound that `max_error` says; `names`: distances as they are measured.

    Raises:
        ValueError: it bounds a distance that is not measured.
    """
    if not isinstance(max_error, Mapping):
        return Bound(dict.fromkeys(names, float(max_error)))
    if unknown := [name for name in max_error if name not in names]:
        raise ValueError(
            f"max_error={dict(max_error)!r}: {', '.join(map(repr, unknown))} is not measured; distances are "
            f"{', '.join(map(repr, names))}"
        )
    return Bound(dict(max_error))


def best(evaluate: Evaluator, full: int) -> Schedule:
    """The best schedule of `full` full steps that was found."""
    return _search(
        evaluate, full, lambda s: log_sum(evaluate.error(s), evaluate.job.weights), evaluate.job.evaluations
    )[0]


def fewest(evaluate: Evaluator, bound: Bound, least: int, most: int) -> Schedule:
    """The best schedule of the fewest full steps, `least` to `most`, whose distances on fitted trajectories are within a bound.

    Their number is found by bisection, for errors fall as it grows, or nearly so; what is returned has been run on all fitted
    trajectories. Each number has its share of the evaluations, and the last one what they left.

    Raises:
        OutOfBound: not even `most` full steps are enough.
    """
    job = evaluate.job
    found: Schedule | None = None

    def excess(schedule: Schedule) -> float:
        """Of all fitted trajectories; where some of them are too far off already, the rest are not run."""
        first = bound.excess(evaluate.error(schedule))
        return first if first > 0 else bound.excess(evaluate.errors(schedule, job.scenes))

    def within(schedule: Schedule) -> float:
        return log_sum(evaluate.error(schedule), job.weights) if excess(schedule) <= 0 else math.inf

    def left() -> int:
        return job.evaluations - len(evaluate.tried)

    low, high = least, most
    while low <= high:
        middle = (low + high) // 2
        share = left() // (high - low + 1).bit_length()
        schedule, value = _search(evaluate, middle, excess, max(1, share), goal=0.0)
        if value <= 0:
            found, high = schedule, middle - 1
        else:
            low = middle + 1
    if found is None:
        raise OutOfBound(
            f"with {most} full steps, the most that leave one to be cached, "
            f"{bound.over(evaluate.errors(schedule, job.scenes))}; raise max_error"
        )
    return _improve(job, [found], within, 1 + max(0, left()))[0]


def _search(
    evaluate: Evaluator, full: int, objective: Callable[[Schedule], float], evaluations: int, goal: float = -math.inf
) -> tuple[Schedule, float]:
    # One start of each phase, in a row.
    starts = [
        sum(parts, ()) for parts in zip(*(_starts(evaluate.job, p, full) for p in evaluate.predictors), strict=True)
    ]
    given = evaluate.job.start
    if given is not None and sum(given) == full * len(evaluate.predictors):
        starts.insert(0, given)
    return _improve(evaluate.job, starts, objective, evaluations, goal)


def _improve(
    job: Job,
    starts: Sequence[Schedule],
    objective: Callable[[Schedule], float],
    evaluations: int,
    goal: float = -math.inf,
) -> tuple[Schedule, float]:
    steps = len(job.timesteps)
    return improve(
        starts,
        objective,
        evaluations=evaluations,
        seed=job.seed,
        must=job.must,
        steps=steps,
        parts=job.parts,
        goal=goal,
    )


def _starts(job: Job, predictor: Predictor, full: int) -> Sequence[Schedule]:
    """What the search of a phase starts from: evenly spaced schedules, and those of dynamic programming.

    Where the batch has parts, `full` counts those of all of them. They are full together, or the first has more full steps
    and the others some of these, most where they move the latent most.
    """
    steps = len(job.timesteps)
    if job.parts == 1:
        return _alike(job, predictor, full)
    assert isinstance(predictor, Outputs)
    others, moves, found = job.parts - 1, predictor.moves(), list[Schedule]()
    late = moves[:, moves.sum(dim=0).argmin()].tolist()
    for share in SHARES:
        least = max(len(job.must), math.ceil((full - steps) / others))
        fewer = min(max(least, round(share * full / job.parts)), full // job.parts)
        for first in _alike(job, predictor, full - others * fewer)[:: 1 if share == SHARES[0] else 2]:
            some = thinned(first, late, fewer, job.must)
            found.append(tuple(int(a) + others * int(b) for a, b in zip(first, some, strict=True)))
    return found


def _alike(job: Job, predictor: Predictor, full: int) -> Sequence[tuple[bool, ...]]:
    steps = len(job.timesteps)
    reach = max(4, math.ceil(3 * steps / full))
    asked = pairs(steps, reach)
    starts = [even_schedule(steps, full, warmup, job.must) for warmup in (3, 1)]
    for power in POWERS:
        errors = dict(zip(asked, predictor.errors(asked, power), strict=True))
        starts.append(seed_schedule(errors, steps, full, reach=reach, must=job.must))
    return starts
