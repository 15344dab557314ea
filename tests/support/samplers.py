"""Samplers of tokens, drawn and made by hand."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from hero_fx.selection import PatchSampler

AETHER = (11, 30, 45)

ratios = st.sampled_from([1 / 6, 1 / 3, 0.1, 0.5, 0.75, 1.0, 0.01, 1e-9]) | st.floats(0.001, 1.0)


@st.composite
def samplers(draw: st.DrawFn, /, **fixed: Any) -> PatchSampler:
    f, h, w = grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7)))
    options: dict[str, Any] = {
        "grid": grid,
        "patch": draw(st.tuples(st.integers(1, f), st.integers(1, min(h, 4)), st.integers(1, min(w, 4)))),
        "ratio": draw(ratios),
        "seed": draw(st.integers(-5, 2**70)),
        "draws": draw(st.integers(1, 3)),
    }
    return PatchSampler(**(options | fixed))


def make(**changes: Any) -> PatchSampler:
    options: dict[str, Any] = {"grid": (2, 4, 6), "patch": (1, 2, 3), "ratio": 1 / 6}
    return PatchSampler(**(options | changes))


def patch_of_each_token(sampler: PatchSampler) -> torch.Tensor:
    """int64 [N]: number of the patch of each token, straight from the definition."""
    keys = [
        tuple(at // p for at, p in zip((f, h, w), sampler.patch, strict=True))
        for f in range(sampler.grid[0])
        for h in range(sampler.grid[1])
        for w in range(sampler.grid[2])
    ]
    numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
    return torch.tensor([numbers[key] for key in keys])


def trajectory(sampler: PatchSampler, steps: int) -> torch.Tensor:
    """int64 [steps, draws, K]."""
    selection = sampler.start()
    return torch.stack([selection.draw() for _ in range(steps)])
