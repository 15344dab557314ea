"""What the arguments of `hero_fx.calibrate` may be."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from hero_fx.arguments import is_number, one_of, whole_number
from hero_fx.plan import POLICIES

__all__ = ["check", "numbers_of"]


def numbers_of(name: str, given: int | Sequence[int], start: int) -> tuple[int, ...]:
    """Numbers of trajectories; a count stands for those from `start` on."""
    if isinstance(given, int):
        whole_number(name, given, 1, "or the numbers of trajectories")
        return tuple(range(start, start + given))
    numbers = tuple(given)
    if not numbers or len(set(numbers)) < len(numbers) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"{name}={given!r} must be a count of at least 1, or different numbers of trajectories")
    return numbers


def check(
    num_steps: int, budget: int | float | None, max_error: float | Mapping[str, float] | None, policies: Sequence[str],
    search: int, full_steps: Collection[int], scenes: tuple[int, ...], holdout: tuple[int, ...], history: int, samples: int,
    by: Collection[str], phases: int, apart: bool = False, closed_loop: int = 1,
) -> None:  # fmt: skip
    """Raises ValueError for arguments of `calibrate` that mean nothing."""
    for name, value, least in (
        ("num_steps", num_steps, 2),
        ("search", search, 1),
        ("samples", samples, 1),
        ("phases", phases, 1),
        ("closed_loop", closed_loop, 0),
    ):
        whole_number(name, value, least)
    _check_budget(num_steps, budget, max_error)
    one_of("history", history, (1, 2, 3))
    for name, given, allowed in (("policies", policies, POLICIES), ("by", by, ("frames", "batch"))):
        unknown = [value for value in given if value not in allowed]
        if isinstance(given, str) or unknown or (name == "policies" and not given):
            raise ValueError(f"{name}={given!r}: choose from {', '.join(map(repr, allowed))}, in a tuple or list")
    if apart and tuple(policies) != ("forecast",):
        raise ValueError(f"apart=True: is for policies=('forecast',), and not for {tuple(policies)!r}")
    if not all(isinstance(step, int) and 0 <= step < num_steps for step in full_steps):
        raise ValueError(f"full_steps={tuple(full_steps)!r} must be steps from 0 to {num_steps - 1}")
    if set(scenes) & set(holdout):
        raise ValueError(
            f"holdout={holdout!r}: trajectories that are fitted to tell nothing; give others than {scenes!r}"
        )


def _check_budget(num_steps: int, budget: int | float | None, max_error: float | Mapping[str, float] | None) -> None:
    if (budget is None) == (max_error is None):
        raise ValueError(
            f"budget={budget!r} and max_error={max_error!r}: give one of them, how much may be computed or how far the sample "
            "may be from full compute's"
        )
    if max_error is not None:
        limits = max_error.values() if isinstance(max_error, Mapping) else [max_error]
        if not limits or not all(is_number(limit) and 0 < limit < math.inf for limit in limits):
            raise ValueError(
                f"max_error={max_error!r} must be a number above 0, such as 0.01, or such numbers by name of the distance"
            )
    elif budget is None or not is_number(budget) or not 1 <= budget < math.inf:
        raise ValueError(
            f"budget={budget!r} must be a number of full steps (an int), or a speed-up (a float, at least 1.0)"
        )
    elif isinstance(budget, int) and budget > num_steps:
        raise ValueError(f"budget={budget!r} full steps, but num_steps={num_steps}; a speed-up is a float, such as 2.0")
