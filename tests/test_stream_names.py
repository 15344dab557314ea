"""Streams are named for what their tokens are: the image, what is denoised beside it, and the text that conditions them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hero_fx.passes.analysis.branches import find_branches
from hero_fx.passes.analysis.tokens import IMAGE, Source

from .support.tracing import normal_form

D = 8


class Joint(nn.Module):
    """Two layers of joint attention on two streams, then an FFN on each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.mixed = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))
        self.mlps = nn.ModuleList(nn.ModuleList(nn.Linear(D, D) for _ in range(2)) for _ in range(2))

    def run(self, x: Tensor, other: Tensor) -> list[Tensor]:
        """Both streams behind the layers."""
        streams = [embed(s) for embed, s in zip(self.embed, (x, other), strict=True)]
        for mixed, mlps in zip(self.mixed, self.mlps, strict=True):
            joined = torch.cat([F.layer_norm(s, (D,)) for s in streams], dim=1)
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in mixed(joined).chunk(3, dim=-1))
            update = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            sizes = [s.shape[1] for s in streams]
            streams = [s + u for s, u in zip(streams, update.split(sizes, dim=1), strict=True)]
            streams = [s + mlp(F.layer_norm(s, (D,))) for s, mlp in zip(streams, mlps, strict=True)]  # type: ignore[call-overload]
        return streams


class Video(Joint):
    """What only conditions does not come out."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Any:
        return self.run(hidden_states, encoder_hidden_states)[0] * 2


class VideoAndSound(Joint):
    """Both come out."""

    def forward(self, hidden_states: Tensor, audio_hidden_states: Tensor) -> Any:
        return [x * 2 for x in self.run(hidden_states, audio_hidden_states)]


class TextComesOut(Joint):
    """The text comes out too."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Any:
        return [x * 2 for x in self.run(hidden_states, encoder_hidden_states)]


class Nameless(Joint):
    """Arguments whose one name tells nothing."""

    def forward(self, *waves: Tensor) -> Any:
        return [x * 2 for x in self.run(*waves)]


class Listens(Joint):
    """Sound that conditions."""

    def forward(self, hidden_states: Tensor, audio_embeds: Tensor) -> Any:
        return self.run(hidden_states, audio_embeds)[0] * 2


class Words(Joint):
    """Words that come out too are still words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, D)

    def forward(self, hidden_states: Tensor, input_ids: Tensor) -> Any:
        return [x * 2 for x in self.run(hidden_states, self.words(input_ids))]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Video, ["image", "text"]),
        (VideoAndSound, ["image", "audio"]),
        (TextComesOut, ["image", "text"]),
        (Nameless, ["image", "text"]),
        (Listens, ["image", "audio"]),
        (Words, ["image", "text"]),
    ],
)
def test_names_of_streams(kind: type[Joint], names: list[str]) -> None:
    other = torch.ones(2, 3, dtype=torch.int64) if kind is Words else torch.ones(2, 3, D)
    structure = find_branches(normal_form(kind().eval(), torch.ones(2, 5, D), other))
    assert [s.name for s in structure.streams] == names
    assert structure.image == IMAGE
    assert structure.lengths == {IMAGE: 5, Source(names[1]): 3}
