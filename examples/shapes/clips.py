"""Generated clips: a coloured shape that moves on a grey ground and bounces off the edges, and the words that tell of it.

A clip is its number. The words say what the shape is, its colour and where it is heading at first; where it starts, how fast
and how large it is and how bright the ground is, they do not say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["FRAMES", "HELD_OUT", "SIZE", "TEXT", "TRAINING", "WORDS", "Clips", "make_clips", "no_text"]

HELD_OUT, TRAINING, NUMBERS = 0, 2**31, 2**32
"""Held-out clip i has the number `HELD_OUT + i` and is never trained on; training clip i has `TRAINING + i`. Numbers end at
`NUMBERS`, for torch's generator looks at their last 32 bits alone."""
FRAMES, SIZE = 8, 32
"""Frames of a clip, and the side of an image in pixels."""
SHAPES = ("disc", "square", "triangle")
COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.8, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "magenta": (0.85, 0.2, 0.85),
    "white": (0.95, 0.95, 0.95),
}
HEADINGS = 8
"""Directions, evenly spread over the circle."""
WORDS = 3
"""Words of a clip: shape, colour and heading."""
VOCABULARY = len(SHAPES) + len(COLOURS) + HEADINGS + 1
TEXT = WORDS + VOCABULARY
"""Width of a word: one number for its place in the sentence and one for each word there is, the last of which is none."""
DRAWS = 16
"""Uniform numbers that one clip is made from."""


@dataclass(frozen=True)
class Clips:
    """Clips and what they are made from."""

    video: Tensor
    """[B, 3, FRAMES, SIZE, SIZE] in [0, 1]."""
    text: Tensor
    """[B, WORDS, TEXT] one-hot."""


def make_clips(numbers: Sequence[int]) -> Clips:
    """The clips of these numbers; each is the same in whatever batch.

    Raises:
        ValueError: a number is not in [0, 2**32).
    """
    draws = []
    for number in numbers:
        if not 0 <= number < NUMBERS:
            raise ValueError(f"number={number}: clips have the numbers 0 to {NUMBERS - 1}")
        draws.append(torch.rand(DRAWS, generator=torch.Generator().manual_seed(number)))
    u = torch.stack(draws)  # [B, DRAWS]
    shape, colour, heading = ((u[:, i] * n).long() for i, n in enumerate((len(SHAPES), len(COLOURS), HEADINGS)))
    radius = 4.5 + 2.5 * u[:, 3]
    start = radius[:, None] + u[:, 4:6] * (SIZE - 2 * radius[:, None])
    angle = heading * (2 * math.pi / HEADINGS)
    speed = 1 + u[:, 6]  # pixels per frame
    velocity = speed[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
    cover = _cover(_bounce(start, velocity, radius), radius, shape)[:, None]
    paint = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None, None]
    ground = (0.1 + 0.25 * u[:, 7])[:, None, None, None, None]
    words = torch.stack([shape, len(SHAPES) + colour, len(SHAPES) + len(COLOURS) + heading], dim=-1)
    return Clips(ground + cover * (paint - ground), _sentence(words))


def no_text(count: int) -> Tensor:
    """[count, WORDS, TEXT]: nothing is told."""
    return _sentence(torch.full((count, WORDS), VOCABULARY - 1))


def _sentence(words: Tensor) -> Tensor:
    place = one_hot(torch.arange(WORDS), WORDS).expand(len(words), -1, -1)
    return torch.cat([place, one_hot(words, VOCABULARY)], dim=-1).float()


def _bounce(start: Tensor, velocity: Tensor, radius: Tensor) -> Tensor:
    """Places [B, FRAMES, 2] (x, y) in pixels, reflected so that a shape stays inside."""
    edge = radius[:, None, None]
    room = SIZE - 2 * edge
    way = start[:, None] - edge + velocity[:, None] * torch.arange(FRAMES)[:, None]
    return edge + room - (way.remainder(2 * room) - room).abs()


def _cover(place: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """How much of each pixel a shape covers, [B, FRAMES, SIZE, SIZE]: from the distance to its edge."""
    pixel = torch.arange(SIZE) + 0.5
    x = (pixel[None, None, None, :] - place[..., 0, None, None]).abs()
    y = pixel[None, None, :, None] - place[..., 1, None, None]
    r = radius[:, None, None, None]
    disc = (x.square() + y.square()).sqrt() - r
    square = torch.maximum(x, y.abs()) - 0.85 * r
    triangle = torch.maximum(y - 0.6 * r, math.sqrt(0.75) * x - 0.5 * y - 0.6 * r)
    edge = torch.stack([disc, square + 0 * disc, triangle], dim=1)
    return (0.5 - edge[torch.arange(len(shape)), shape]).clamp(0, 1)
