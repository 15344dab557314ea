"""Which steps are full: dynamic programming on one-step errors as a seed, then moves that the true final error decides."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .solve import Past

__all__ = ["even_schedule", "improve", "pairs", "seed_schedule", "thinned"]

POWER = 2
"""Of a segment's error: above 1, because one bad stretch hurts more than its share."""

Schedule = tuple[int, ...]
"""Of each step how many parts of the batch are full: 0 or 1 (false or true) where it is one, else up to their number."""


def pairs(steps: int, reach: int) -> list[Past]:
    """Every cached step with two full steps before it that dynamic programming may ask for: at most `reach` steps apart."""
    found = []
    for i in range(steps):
        before: list[tuple[int, ...]] = [(i,)] if i == 0 else [(i, j) for j in range(max(0, i - reach), i)]
        found += [Past(k, fulls) for fulls in before for k in range(i + 1, min(steps, i + reach))]
    return found


@dataclass(frozen=True, slots=True)
class _State:
    cost: float
    fulls: tuple[int, ...]


def seed_schedule(
    errors: dict[Past, float], steps: int, full: int, *, reach: int, must: Collection[int] = ()
) -> tuple[bool, ...]:
    """The schedule of `full` full steps with the least sum over segments of (sum of errors)^2.

    Args:
        errors: of every past of `pairs(steps, reach)`.
        must: steps that have to be full.

    Raises:
        ValueError: so few full steps do not reach over all steps, or hold those that must be full.
    """
    best: dict[tuple[int, ...], _State] = {(0,): _State(0.0, (0,))}
    needed = sorted({0, *must})
    for _ in range(full - 1):
        after: dict[tuple[int, ...], _State] = {}
        for past, state in best.items():
            total, i = 0.0, past[0]
            for n in range(i + 1, min(steps, i + reach + 1)):
                found = after.get((n, i))
                cost = state.cost + total**POWER
                if found is None or cost < found.cost:
                    after[n, i] = _State(cost, (*state.fulls, n))
                if n in needed or Past(n, past) not in errors:
                    break
                total += errors[Past(n, past)]
        best = after
    ends = []
    for past, state in best.items():
        rest = [Past(k, past) for k in range(past[0] + 1, steps)]
        if all(p in errors and p.step not in needed for p in rest):
            ends.append((state.cost + sum(errors[p] for p in rest) ** POWER, state.fulls))
    if not ends:
        raise ValueError(
            f"{full} full steps do not reach over {steps} steps"
            f"{f' with the steps {needed} full' if len(needed) > 1 else ''}: allow more full steps"
        )
    chosen = set(min(ends)[1])
    return tuple(step in chosen for step in range(steps))


def thinned(
    schedule: Sequence[bool], weights: Sequence[float], full: int, must: Collection[int] = ()
) -> tuple[bool, ...]:
    """`full` of a schedule's full steps: those that must be, the last, and the rest with equal sums of weights between them."""
    fulls = [step for step, own in enumerate(schedule) if own]
    kept = {0, *must} | ({fulls[-1]} if full > len({0, *must}) else set())
    total, rest = list(accumulate(max(weights[step], 1e-9) for step in fulls)), full - len(kept)
    for n in range(rest):
        wanted = total[-1] * (n + 0.5) / rest
        free = [(abs(at - wanted), step) for at, step in zip(total, fulls, strict=True) if step not in kept]
        kept.add(min(free)[1])
    return tuple(step in kept for step in range(len(schedule)))


def even_schedule(steps: int, full: int, warmup: int, must: Collection[int] = ()) -> tuple[bool, ...]:
    """`full` full steps: those that must be, the first `warmup`, and the rest evenly spaced up to the last step."""
    chosen = {0, *must}
    chosen |= set(range(min(warmup, full - len(chosen) + 1)))
    start, rest = min(warmup, full) - 1, full - len(chosen)
    spread = [start + round(n * (steps - 1 - start) / rest) for n in range(1, rest + 1)]
    chosen |= set(spread)
    while len(chosen) < full:  # some fell on others: the farthest from all takes their place
        free = [s for s in range(steps) if s not in chosen]
        chosen.add(max(free, key=lambda s: min(abs(s - c) for c in chosen)))
    return tuple(s in chosen for s in range(steps))


def improve(
    starts: Sequence[Schedule],
    objective: Callable[[Schedule], float],
    *,
    evaluations: int,
    seed: int,
    must: Collection[int] = (),
    steps: int | None = None,
    parts: int = 1,
    goal: float = -math.inf,
) -> tuple[Schedule, float]:
    """Takes the best start and moves full steps, one at a time, wherever that lowers the objective; at most so many
    evaluations, and no more once it is down to the goal.

    First each full step to a neighbouring place, then to any free one, in an order that the seed decides. A schedule may be
    that of several trajectories of `steps` steps in a row: full steps stay in theirs, and `must` holds for each. Where the
    batch has `parts`, one of them is moved at a time.
    """
    rng = random.Random(seed)
    found: dict[Schedule, float] = {}
    best = starts[0]
    for start in dict.fromkeys(starts[:evaluations]):
        found[start] = objective(start)
        best = min(best, start, key=found.__getitem__)
        if found[best] <= goal:
            return best, found[best]
    moved = True
    while moved:
        moved = False
        for schedule in _moves(best, rng, must, steps or len(best), parts):
            if len(found) >= evaluations or found[best] <= goal:
                break
            if schedule in found:
                continue
            found[schedule] = objective(schedule)
            if found[schedule] < found[best]:
                best, moved = schedule, True
                break
    return best, found[best]


def _moves(schedule: Schedule, rng: random.Random, must: Collection[int], steps: int, parts: int) -> Sequence[Schedule]:
    fixed = {0, *must}
    fulls = [s for s, level in enumerate(schedule) if level and s % steps not in fixed]
    free = [s for s, level in enumerate(schedule) if level < parts]
    pairs = [(a, b) for a in fulls for b in free if a // steps == b // steps and a != b]
    near = [(a, b) for a, b in pairs if abs(a - b) == 1]
    far = [(a, b) for a, b in pairs if abs(a - b) > 1]
    rng.shuffle(near)
    rng.shuffle(far)
    return [tuple(level + (s == b) - (s == a) for s, level in enumerate(schedule)) for a, b in (*near, *far)]
