"""Patch-wise sampling: counts, quotas, seeds, and what is refused. How long tokens wait: test_selection_ages.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hero_fx.selection import PatchSampler

from .support.samplers import AETHER, make, patch_of_each_token, ratios, samplers, trajectory


@settings(deadline=None)
@given(samplers())
def test_every_draw_has_count_tokens_in_order(sampler: PatchSampler) -> None:
    tokens = math.prod(sampler.grid)
    drawn = trajectory(sampler, 5)
    assert sampler.count == max(1, round(sampler.ratio * tokens))
    assert drawn.shape == (5, sampler.draws, sampler.count)
    assert drawn.dtype == torch.int64
    assert bool((drawn[..., 1:] > drawn[..., :-1]).all())  # sorted, no repeats
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < tokens


@settings(deadline=None)
@given(samplers(), st.lists(st.booleans(), min_size=1, max_size=8))
def test_ages_count_the_draws_a_token_was_left_out_of(sampler: PatchSampler, full: list[bool]) -> None:
    selection = sampler.start()
    expected = torch.zeros(sampler.draws, math.prod(sampler.grid), dtype=torch.int64)
    for is_full in full:
        if is_full:
            selection.refreshed()
            expected.zero_()
        else:
            expected = (expected + 1).scatter(1, selection.draw(), 0)
        assert selection.ages.dtype == torch.int64
        assert torch.equal(selection.ages, expected)


@settings(deadline=None)
@given(samplers(), st.integers(1, 5))
def test_each_patch_gives_the_whole_part_of_its_share_and_at_most_one_more(sampler: PatchSampler, steps: int) -> None:
    patches = patch_of_each_token(sampler)
    sizes = patches.bincount()
    quotas = sampler.quotas
    for rows in trajectory(sampler, steps):
        for row in rows:
            given_ = patches[row].bincount(minlength=len(sizes))
            for size, number in zip(sizes.tolist(), given_.tolist(), strict=True):
                assert quotas[size].base <= number <= quotas[size].base + (quotas[size].extra > 0)


@pytest.mark.parametrize(
    ("grid", "patch", "ratio", "each"),
    [
        ((2, 4, 9), (1, 2, 3), 1 / 6, 1),
        ((3, 4, 4), (1, 2, 2), 0.75, 3),
        ((2, 5, 10), (2, 5, 1), 0.3, 3),
        ((2, 3, 5), (1, 1, 1), 1.0, 1),
        ((4, 10, 10), (4, 10, 10), 0.29, 116),  # 0.29 * 400 is less than 116 in floating point
    ],
)
def test_patches_that_divide_the_grid_give_exactly_their_share(
    grid: tuple[int, int, int], patch: tuple[int, int, int], ratio: float, each: int
) -> None:
    sampler = PatchSampler(grid=grid, patch=patch, ratio=ratio, draws=2)
    patches = patch_of_each_token(sampler)
    for rows in trajectory(sampler, 6):
        for row in rows:
            assert patches[row].bincount().tolist() == [each] * int(patches.max() + 1)


def test_inner_patches_give_their_share_also_if_the_edges_have_none() -> None:
    sampler = PatchSampler(grid=(1, 5, 8), patch=(1, 2, 3), ratio=1 / 6)
    patches = patch_of_each_token(sampler)
    whole = patches.bincount() == 6
    for (row,) in trajectory(sampler, 20):
        assert patches[row].bincount(minlength=len(whole))[whole].tolist() == [1, 1, 1, 1]


@settings(deadline=None)
@given(st.floats(0.0001, 1.0) | ratios, st.sampled_from([(5, 7, 11), (11, 30, 45), (1, 1000, 1000), (3, 1, 1)]))
def test_quotas_add_up_to_the_count(ratio: float, grid: tuple[int, int, int]) -> None:
    sampler = PatchSampler(grid=grid, patch=(1, 1, 1), ratio=ratio)
    for patch in [(2, 3, 4), (1, 1, 1), (5, 5, 5), (2, 2, 2)]:
        fitting = tuple(map(min, patch, grid))
        sampler = PatchSampler(grid=grid, patch=fitting, ratio=ratio)  # type: ignore[arg-type]
        quotas = sampler.quotas
        cuts = [[min(p, g - at) for at in range(0, g, p)] for g, p in zip(grid, fitting, strict=True)]
        number = dict.fromkeys(quotas, 0)
        for f in cuts[0]:
            for h in set(cuts[1]):
                for w in set(cuts[2]):
                    number[f * h * w] += cuts[1].count(h) * cuts[2].count(w)
        unit = next(iter(quotas.values())).unit
        total = sum((q.base * unit + q.extra) * number[size] for size, q in quotas.items())
        assert total == sampler.count * unit
        assert all(0 <= q.extra <= unit and q.base + (q.extra > 0) <= size for size, q in quotas.items())
        assert unit * (sampler.count + 1) < 2**62  # the walk over the patches is summed in int64
        # A token's share is the same in all patches, but for the rounding of the count.
        for size, quota in quotas.items():
            assert abs((quota.base + quota.extra / unit) / size - sampler.count / math.prod(grid)) < 0.5


@settings(deadline=None)
@given(samplers(ratio=1 / 6))
def test_shares_are_exact_in_the_long_run(sampler: PatchSampler) -> None:
    patches = patch_of_each_token(sampler)
    sizes = patches.bincount().tolist()
    quotas = sampler.quotas
    unit = next(iter(quotas.values())).unit
    if unit > 40:
        return
    selection = sampler.start()
    selection.draw()  # any `unit` draws in a row will do
    given_ = torch.zeros(sampler.draws, len(sizes), dtype=torch.int64)
    for _ in range(unit):
        for row, tokens in enumerate(selection.draw()):
            given_[row] += patches[tokens].bincount(minlength=len(sizes))
    expected = [quotas[size].base * unit + quotas[size].extra for size in sizes]
    assert given_.tolist() == [expected] * sampler.draws


def test_no_patch_is_starved_by_rounding() -> None:
    # 4 of 9 tokens: the whole parts of 4/2 + 2/2 + 2/2 + 1/2 take all 4, and the corner would never be drawn.
    sampler = PatchSampler(grid=(3, 1, 3), patch=(2, 1, 2), ratio=0.5)
    assert trajectory(sampler, 9).flatten().bincount().tolist() == pytest.approx([4] * 9, abs=2)
    assert sampler.max_age is not None
    assert sampler.max_age < 9


def test_shares_on_a_grid_that_patches_do_not_divide() -> None:
    # 1/6 of patches of 4, and of 2 at the edge: 2 tokens in 3 draws, and 1.
    sampler = PatchSampler(grid=(1, 6, 9), patch=(1, 2, 2), ratio=1 / 6)
    patches = patch_of_each_token(sampler)
    given_ = sum(patches[row].bincount(minlength=15) for (row,) in trajectory(sampler, 30))
    assert isinstance(given_, torch.Tensor)
    assert given_.tolist() == [20, 20, 20, 20, 10] * 3


def test_same_seed_same_indices() -> None:
    sampler = PatchSampler(grid=(3, 8, 9), patch=(1, 2, 2), ratio=1 / 6, seed=3, draws=2)
    expected = trajectory(sampler, 6)
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.device("meta"), torch.inference_mode():
            again = trajectory(PatchSampler(grid=(3, 8, 9), patch=(1, 2, 2), ratio=1 / 6, seed=3, draws=2), 6)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, expected)
    state = torch.get_rng_state()
    sampler.start().draw()
    assert torch.equal(torch.get_rng_state(), state)
    other = trajectory(PatchSampler(grid=(3, 8, 9), patch=(1, 2, 2), ratio=1 / 6, seed=4, draws=2), 6)
    assert not torch.equal(other, expected)


@settings(deadline=None)
@given(samplers(draws=3), st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_row_does_not_depend_on_the_others(sampler: PatchSampler, full: list[bool]) -> None:
    two = PatchSampler(grid=sampler.grid, patch=sampler.patch, ratio=sampler.ratio, seed=sampler.seed, draws=2).start()
    three = sampler.start()
    for is_full in full:
        if is_full:
            two.refreshed()
            three.refreshed()
        assert torch.equal(two.draw(), three.draw()[:2])


def test_rows_and_draws_differ() -> None:
    rows = trajectory(PatchSampler(grid=AETHER, patch=(1, 2, 3), ratio=1 / 6, draws=3), 2).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == 6
    # Independent selections of 1/6 share 1/36.
    shared = len(set(rows[0].tolist()) & set(rows[1].tolist()))
    assert shared == pytest.approx(14850 / 36, abs=4 * math.sqrt(14850 / 36))


@pytest.mark.parametrize("outer", [True, False])
def test_inference_mode_may_come_and_go(outer: bool) -> None:
    sampler = PatchSampler(grid=(2, 4, 6), patch=(1, 2, 3), ratio=1 / 6)
    with torch.inference_mode(outer):
        selection = sampler.start()
        first = selection.draw()
    with torch.inference_mode(not outer):
        selection.refreshed()
        second = selection.draw()
    assert not first.is_inference()
    assert not second.is_inference()


def test_samplers_are_values() -> None:
    assert make() == make() != make(seed=1)
    assert len({make(), make(), make(draws=2)}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (2, 4)}, r"grid=\(2, 4\) must be three whole numbers"),
        ({"grid": (0, 4, 6)}, r"grid=\(0, 4, 6\)"),
        ({"patch": (1, 2, -3)}, r"patch=\(1, 2, -3\) must be three whole numbers"),
        ({"patch": (1, 2, 3.0)}, r"patch=\(1, 2, 3\.0\)"),
        ({"patch": (1, 2, True)}, r"patch=\(1, 2, True\)"),
        ({"patch": (3, 2, 3)}, r"patch=\(3, 2, 3\) is larger than grid=\(2, 4, 6\).*Try patch=\(2, 2, 3\)"),
        ({"ratio": 0.0}, r"ratio=0\.0 is not allowed; it must lie in \(0, 1\]"),
        ({"ratio": 1.01}, r"ratio=1\.01"),
        ({"ratio": math.nan}, r"ratio=nan"),
        ({"ratio": True}, r"ratio=True"),
        ({"draws": 0}, r"draws=0 must be a whole number of at least 1"),
        ({"seed": 0.5}, r"seed=0\.5 must be a whole number"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)
