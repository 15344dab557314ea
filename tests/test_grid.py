"""`find_grid`: the grid on which the image tokens of a stream lie, from the convolution in front or the unpatchify at the end."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor, nn

from hero_fx.passes.analysis.branches import find_branches
from hero_fx.passes.analysis.grid import find_grid, shard_of

from .support.layers import D, Part, norm
from .support.tracing import normal_form, trace


class Grid(nn.Module):
    """A convolution or a plain projection in front, one block, and an unpatchify to the grid at the end."""

    def __init__(self, embed: nn.Module, end: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.embed, self.part, self.end = embed, Part(), end

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.embed(x)
        if x.dim() == 5:
            x = x.flatten(2).transpose(1, 2)
        elif x.dim() == 4:
            x = x.flatten(2).transpose(1, 2).reshape(batch, -1, D)
        x = x + self.part.ffn(norm(x))
        return x if self.end is None else x.reshape(batch, *self.end)


class Frames(nn.Conv2d):
    """A convolution over frames [B, F, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1))


@pytest.mark.parametrize(
    ("model", "shape", "grid"),
    [
        (Grid(nn.Conv2d(3, D, 2, 2)), (2, 3, 6, 10), (1, 3, 5)),
        (Grid(Frames(3, D, 2, 2)), (2, 7, 3, 6, 10), (7, 3, 5)),
        (Grid(nn.Conv3d(3, D, (1, 2, 2), (1, 2, 2))), (2, 3, 7, 6, 10), (7, 3, 5)),
        (Grid(nn.Linear(3, D), (7, 3, 5, 1, 2, 2, 2)), (2, 105, 3), (7, 3, 5)),
        (Grid(nn.Linear(3, D), (3, 5, 2, 2, 2)), (2, 15, 3), (1, 3, 5)),
        (Grid(nn.Linear(3, D), (15, 1, 2, 2, 2)), (2, 15, 3), None),
        (Grid(nn.Linear(3, D)), (2, 15, 3), None),
    ],
    ids=[
        "image convolution",
        "frame convolution",
        "video convolution",
        "video unpatchify",
        "image unpatchify",
        "patches one by one",
        "none",
    ],
)
def test_grid(model: nn.Module, shape: tuple[int, ...], grid: tuple[int, int, int] | None) -> None:
    structure = find_branches(normal_form(model.eval(), torch.ones(shape)))
    assert structure.image_tokens == (prod(grid) if grid else 15)
    assert structure.grid == grid


def test_grid_of_patches_that_are_packed_without_a_batch() -> None:
    class Packed(Part):
        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(105, D)[None]
            return (x + self.attention(x))[0]

    assert find_branches(normal_form(Packed().eval(), torch.ones(7, 3, 5, 2, 4))).grid == (7, 3, 5)


def test_no_grid_of_no_tokens() -> None:
    assert find_grid(trace(lambda x: x + 1, torch.ones(2)), 0) is None


@pytest.mark.parametrize(
    ("grid", "ranks", "own"),
    [((4, 3, 5), 2, (2, 3, 5)), ((1, 6, 5), 3, (1, 2, 5)), ((3, 4, 5), 2, None), ((1, 3, 4), 2, None)],
    ids=["frames", "rows", "no whole frames", "no whole rows"],
)
def test_the_part_of_one_rank(grid: tuple[int, int, int], ranks: int, own: tuple[int, int, int] | None) -> None:
    assert shard_of(grid, ranks) == own
