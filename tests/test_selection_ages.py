"""How long tokens wait to be sampled: the proved bound, and what age weighting is for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hero_fx.quota import Quota
from hero_fx.selection import PatchSampler, Selection

from .support.samplers import AETHER, patch_of_each_token, samplers, trajectory


@settings(deadline=None)
@given(st.integers(1, 400), st.data())
def test_wait_is_the_longest_gap_between_extras(unit: int, data: st.DataObject) -> None:
    extra = data.draw(st.integers(1, unit))
    stride = data.draw(st.integers(1, unit).filter(lambda n: math.gcd(n, unit) == 1))
    quota = Quota(size=3, base=0, extra=extra, unit=unit, stride=stride)
    hits = [t for t in range(2 * unit + 1) if t * stride % unit >= unit - extra]
    assert quota.wait == max(b - a for a, b in pairwise(hits))


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(0, 30), st.integers(1, 30), st.data())
def test_max_age_is_what_the_proof_says(base: int, extra: int, unit: int, data: st.DataObject) -> None:
    extra = max(min(extra, unit), int(base == 0))
    size = data.draw(st.integers(base + (extra > 0), 30))
    stride = data.draw(st.integers(1, unit).filter(lambda n: math.gcd(n, unit) == 1))
    quota = Quota(size=size, base=base, extra=extra, unit=unit, stride=stride)
    wait = quota.wait or 10**9
    n = size - max(base, 1 if quota.late >= wait else 0)
    draws = next(w for w in range(10**6) if base * w + w // wait >= n)
    assert quota.late == math.ceil(size / (base + extra / unit) - 1e-9)
    assert quota.max_age == quota.late - 1 + draws


@settings(max_examples=60, deadline=None)
@given(samplers(), st.lists(st.integers(0, 30), max_size=2))
def test_no_token_waits_longer_than_max_age(sampler: PatchSampler, full: list[int]) -> None:
    assert sampler.max_age is not None
    selection = sampler.start()
    for step in range(min(3 * sampler.max_age, 80) + 3):
        if step in full:
            selection.refreshed()
        selection.draw()
        assert int(selection.ages.max()) <= sampler.max_age


def unlucky(sampler: PatchSampler, doublings: float = 100.0) -> Selection:
    """A trajectory whose lottery is rigged: every missed draw lowers a token's odds, unless it is late."""
    selection = sampler.start()
    selection._luck = 2.0 ** torch.arange(65, dtype=torch.float64).mul(doublings).clamp(max=900)
    return selection


@settings(max_examples=60, deadline=None)
@given(samplers())
def test_max_age_holds_against_bad_luck(sampler: PatchSampler) -> None:
    assert sampler.max_age is not None
    selection = unlucky(sampler)
    for _ in range(min(3 * sampler.max_age, 80) + 3):
        selection.draw()
        assert int(selection.ages.max()) <= sampler.max_age


def test_max_age_is_reached_by_bad_luck() -> None:
    sampler = PatchSampler(grid=(1, 2, 3), patch=(1, 2, 3), ratio=1 / 6)
    selection = unlucky(sampler)
    oldest = 0
    for _ in range(40):
        selection.draw()
        oldest = max(oldest, int(selection.ages.max()))
    assert oldest == sampler.max_age == 10


@pytest.mark.parametrize(
    ("patch", "ratio", "max_age"),
    [((1, 2, 3), 1 / 6, 10), ((1, 1, 1), 1 / 6, 5), ((1, 2, 3), 1.0, 0), ((1, 2, 3), 0.5, 2)],
)
def test_max_age_of_the_paper_grid(patch: tuple[int, int, int], ratio: float, max_age: int) -> None:
    assert PatchSampler(grid=AETHER, patch=patch, ratio=ratio).max_age == max_age
    assert PatchSampler(grid=AETHER, patch=patch, ratio=ratio, age_weighting=False).max_age is None


def test_odds_double_with_every_missed_draw() -> None:
    # Of 6 tokens the one drawn first has weight 1 at the second draw, the others 2: it comes again with 1/11.
    for age_weighting, chance in [(True, 1 / 11), (False, 1 / 6)]:
        sampler = PatchSampler(grid=AETHER, patch=(1, 2, 3), ratio=1 / 6, draws=21, age_weighting=age_weighting)
        first, second = trajectory(sampler, 2)
        again = sum(len(set(a) & set(b)) for a, b in zip(first.tolist(), second.tolist(), strict=True))
        tries = 21 * 2475
        assert again == pytest.approx(tries * chance, abs=4 * math.sqrt(tries * chance * (1 - chance)))


@settings(max_examples=60, deadline=None)
@given(samplers(draws=1), st.sampled_from([0.0, 0.5]))
@example(PatchSampler(grid=(4, 6, 7), patch=(2, 3, 3), ratio=1 / 6), 0.0)
def test_late_tokens_go_first_and_the_oldest_before_the_others(sampler: PatchSampler, doublings: float) -> None:
    patches = patch_of_each_token(sampler)
    late = torch.tensor([sampler.quotas[size].late for size in patches.bincount().tolist()])[patches]
    selection = unlucky(sampler, doublings)
    for _ in range(30):
        (ages,) = selection.ages
        (tokens,) = selection.draw()
        drawn = torch.zeros_like(ages, dtype=torch.bool)
        drawn[tokens] = True
        for patch in patches[(ages >= late) & ~drawn].unique():
            here = patches == patch
            left_out = int(ages[here & ~drawn].max())
            assert all(age >= left_out for age in ages[here & drawn].tolist())


def oldest(sampler: PatchSampler, steps: int, interval: int | None) -> tuple[float, float]:
    """(mean over the draws of the greatest age, mean over draws and tokens of age >= 8 as 0 or 1)."""
    selection = sampler.start()
    greatest, tail = [], []
    for step in range(steps):
        if interval and step % interval == 0:
            selection.refreshed()
        selection.draw()
        ages = selection.ages.double()
        greatest.append(ages.max().item())
        tail.append((ages >= 8).double().mean().item())
    return sum(greatest) / steps, sum(tail) / steps


def test_age_weighting_lowers_the_oldest_age() -> None:
    means, tails = zip(
        *(
            oldest(PatchSampler(grid=(3, 12, 18), patch=(1, 2, 3), ratio=1 / 6, age_weighting=on), 150, None)
            for on in (True, False)
        ),
        strict=True,
    )
    # Uniform sampling leaves (5/6)^8 = 0.23 of the tokens out 8 times in a row, and some of 648 for 30 and more.
    assert means[0] < 0.4 * means[1]
    assert tails[0] < 0.05 * tails[1]


def test_age_weighting_refreshes_more_tokens_between_full_steps() -> None:
    refreshed = {}
    for on in (True, False):
        sampler = PatchSampler(grid=AETHER, patch=(1, 2, 3), ratio=1 / 6, age_weighting=on)
        refreshed[on] = len(set(trajectory(sampler, 3).flatten().tolist())) / 14850
    assert refreshed[False] == pytest.approx(1 - (5 / 6) ** 3, abs=0.01)
    assert refreshed[True] > refreshed[False] + 0.03


@pytest.mark.parametrize("age_weighting", [True, False])
def test_tokens_of_a_patch_have_equal_chances_after_a_full_step(age_weighting: bool) -> None:
    sampler = PatchSampler(grid=(1, 40, 60), patch=(1, 2, 3), ratio=1 / 6, draws=9, age_weighting=age_weighting)
    selection = sampler.start()
    selection.draw()
    selection.refreshed()
    tokens = selection.draw().flatten()
    places = (tokens // 60 % 2) * 3 + tokens % 60 % 3
    assert places.bincount().tolist() == pytest.approx([600] * 6, abs=4 * math.sqrt(3600 * 5 / 36))
