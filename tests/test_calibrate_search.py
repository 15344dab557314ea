"""What calibration is made of: least squares, and the search for schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from hero_fx.calibration.evaluate import log_sum
from hero_fx.calibration.search import even_schedule, improve, pairs, seed_schedule
from hero_fx.calibration.settle import weights_of
from hero_fx.calibration.solve import RIDGE, Past, fit


def series(steps: int, channels: int = 2, positions: int = 50, seed: int = 1) -> Tensor:
    return torch.randn(channels, steps, positions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(z: Tensor) -> Tensor:
    return z @ z.transpose(1, 2)


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("history", [1, 2, 3])
def test_coefficients_are_those_of_least_squares(history: int, latent: bool) -> None:
    steps = 6
    z = series(2 * steps)
    found = fit(gram(z if latent else z[:, :steps]), [Past(5, (4, 2, 0))], steps=steps, history=history, latent=latent)
    for c in range(2):
        v, x = z[c, :steps], z[c, steps:]
        columns = [v[4], v[4] - v[2], v[4] - v[0]][:history] + ([x[5] - x[4], x[4] - x[2]] if latent else [])
        table = torch.stack(columns, dim=1)
        solved = torch.linalg.lstsq(table, (v[5] - v[4])[:, None]).solution
        theta = torch.cat([found.theta[c, 0, :history], found.theta[c, 0, 3:]])
        torch.testing.assert_close(theta, solved[:, 0], atol=2e-3, rtol=2e-3)
        residual = (table @ solved)[:, 0] - (v[5] - v[4])
        torch.testing.assert_close(found.error[c, 0], residual.square().sum(), atol=1e-2, rtol=1e-2)


def test_what_follows_a_rule_exactly_is_found() -> None:
    v = series(4)
    v[:, 3] = 1.5 * v[:, 2] - 0.5 * v[:, 1] + 0.1 * (v[:, 2] - v[:, 0])
    found = fit(gram(v), [Past(3, (2, 1, 0))], steps=4, history=3, latent=False)
    assert float(found.error.max()) < 0.1 * RIDGE
    torch.testing.assert_close(found.theta[:, 0, 1], torch.full((2,), 0.5, dtype=torch.float64), atol=1e-2, rtol=0)


def test_missing_full_steps_have_no_coefficients() -> None:
    found = fit(gram(series(6)), [Past(1, (0,))], steps=3, history=3, latent=True)
    assert float(found.theta[:, 0, [1, 2, 4]].abs().max()) == 0.0


def cost(schedule: Sequence[bool], errors: dict[Past, float]) -> float:
    """The sum over segments of (sum of errors)^2, written down again."""
    fulls = [s for s, full in enumerate(schedule) if full]
    total = 0.0
    for n, i in enumerate(fulls):
        end = fulls[n + 1] if n + 1 < len(fulls) else len(schedule)
        past = (i, fulls[n - 1]) if n else (i,)
        total += sum(errors[Past(k, past)] for k in range(i + 1, end)) ** 2
    return total


@pytest.mark.parametrize("must", [(), (4,)])
def test_dynamic_programming_finds_the_best(must: tuple[int, ...]) -> None:
    steps, full = 8, 4
    asked = pairs(steps, steps)
    values = torch.rand(len(asked), generator=torch.Generator().manual_seed(3)).tolist()
    errors = dict(zip(asked, values, strict=True))
    found = seed_schedule(errors, steps, full, reach=steps, must=must)
    others = [c for c in combinations(range(1, steps), full - 1) if set(must) <= set(c)]
    best = min(cost([s == 0 or s in c for s in range(steps)], errors) for c in others)
    assert cost(found, errors) == pytest.approx(best)
    assert sum(found) == full
    assert all(found[s] for s in must)


def test_too_few_full_steps_are_refused() -> None:
    asked = pairs(12, 3)
    with pytest.raises(ValueError, match="2 full steps do not reach over 12 steps"):
        seed_schedule(dict.fromkeys(asked, 1.0), 12, 2, reach=3)


def test_moves_lower_the_objective_and_stop_in_time() -> None:
    wanted = tuple(s in (0, 3, 7, 9) for s in range(10))
    seen: list[tuple[int, ...]] = []

    def objective(schedule: tuple[int, ...]) -> float:
        seen.append(schedule)
        return sum(a != b for a, b in zip(schedule, wanted, strict=True))

    start = tuple(s < 4 for s in range(10))
    best, value = improve([start], objective, evaluations=500, seed=0)
    assert (best, value) == (wanted, 0)
    assert all(sum(schedule) == 4 and schedule[0] for schedule in seen)
    seen.clear()
    kept, _ = improve([start], objective, evaluations=5, seed=0, must=(1,))
    assert len(seen) == 5
    assert kept[1]


@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.parametrize("full", [1, 2, 4, 7, 12, 29, 30])
@pytest.mark.parametrize("must", [(), (5,)])
def test_even_schedules_have_as_many_full_steps_as_asked(warmup: int, full: int, must: tuple[int, ...]) -> None:
    must = must[: full - 1]
    found = even_schedule(30, full, warmup, must)
    assert sum(found) == full
    assert all(found[: min(warmup, full - len(must))])
    assert all(found[s] for s in must)
    places = [s for s, is_full in enumerate(found) if is_full]
    if 7 <= full <= 12 and not must:
        gaps = [b - a for a, b in zip(places[warmup - 1 :], places[warmup:], strict=False)]
        assert max(gaps) - min(gaps) <= 1
        assert places[-1] == 29


def test_weights_say_which_distance_counts() -> None:
    assert log_sum({"a": math.e, "b": math.e**2}, {"b": 3}) == pytest.approx(1 + 3 * 2)
    with pytest.raises(ValueError, match=r"weights=\{'c': 2\}: 'c' must be one of 'a', 'b'"):
        weights_of({"c": 2}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="a number above 0"):
        weights_of({"a": 0}, {"a": 1.0, "b": 1.0})
