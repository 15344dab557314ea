"""The sampler that a model gets: its token grid, cut into the patches of the options."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod

from hero_fx.passes.analysis.grid import shard_of
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.rewrite.plan import Refresh, ScoredRefresh, StepPlan

from .config import Config
from .selection import PatchSampler

__all__ = ["make_sampler", "token_grid"]

log = logging.getLogger(__name__)


def token_grid(structure: Structure, config: Config) -> tuple[int, int, int] | None:
    """(frames, height, width) of the image tokens: as the options say, or as the graph shows it; None where it does not.

    Where ranks share the tokens, those of one rank: the options may say the grid of all.

    Raises:
        ValueError: the options' grid does not hold the model's image tokens.
    """
    if config.grid is None:
        return structure.grid
    frames, height, width = config.grid
    if frames * height * width == structure.image_tokens * structure.ranks > structure.image_tokens:
        return shard_of((frames, height, width), structure.ranks)
    if frames * height * width != structure.image_tokens:
        raise ValueError(
            f"grid={config.grid} holds {frames * height * width} tokens but the model has {structure.image_tokens} image "
            "tokens; give (frames, height, width) after patch embedding"
        )
    return frames, height, width


def make_sampler(
    structure: Structure, config: Config, grid: tuple[int, int, int] | None, plans: Sequence[StepPlan]
) -> PatchSampler | None:
    """The patch-wise sampling of a model's tokens; None where no plan samples any."""
    strategies = [strategy for plan in plans for _, strategy in plan]
    refreshes = [s for s in strategies if isinstance(s, Refresh)]
    if not refreshes and not any(isinstance(s, ScoredRefresh) for s in strategies):
        return None
    patch = (config.patch[0], config.patch[1], config.patch[2])
    if grid is None:
        # Packed latents do not show their grid. Tokens in a row are neighbours in any: each run of them is a patch.
        log.warning(
            "the token grid of the %d image tokens could not be read from the graph: runs of %d tokens in a row are taken for "
            "patches; pass grid=(frames, height, width) in tokens to hero_fx.backend for patches of %s",
            structure.image_tokens, prod(patch), patch,
        )  # fmt: skip
        grid, patch = (1, 1, structure.image_tokens), (1, 1, min(prod(patch), structure.image_tokens))
    if not refreshes:
        return None
    draws = structure.depth if any(s.per_layer for s in refreshes) else 1
    return PatchSampler(
        grid=grid,
        patch=patch,
        ratio=config.refresh_ratio,
        seed=config.seed,
        draws=draws,
        age_weighting=config.age_weighting,
    )
