"""`find_timestep`: a timestep is known by what it is and where it goes; a name alone decides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hero_fx

from .support import tiny, toys
from .support.tracing import Variants

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Named(nn.Module):
    """The toy, called with a second input under a name of a timestep."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner, self.what = toys.toy(), what
        self.words, self.project = nn.Embedding(11, toys.WIDTH), nn.Linear(7, toys.WIDTH)

    def forward(self, latents: Tensor, t: Tensor, when: Tensor) -> Tensor:
        match self.what:
            case "ids":
                text = self.words(t).mean(1)
            case "pooled":
                text = self.project(t)
            case _:
                text = t.mean(1)
        result: Tensor = self.inner(latents + text.mean(-1)[:, None, None], when)
        return result


TEXTS = {
    "embeddings": torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)),
    "ids": torch.tensor([[1, 4, 2], [3, 10, 0]]),
    "pooled": torch.randn(2, 7, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_under_the_name_of_a_timestep_is_none(what: str) -> None:
    """And is refused where it is named by argument."""
    variants = Variants(found=toys.toy_backend(warmup=2), named=hero_fx.backend(timestep="t", inner="eager"))
    run = toys.torch_compile(tiny.randomized(Named(what)), variants, fullgraph=True)
    variants.now = "found"
    toys.loop(lambda x, time: run(x, TEXTS[what], time), toys.latents(), toys.times(9))
    stats = variants.backends["found"].stats()
    assert (stats.full_steps, stats.cached_steps) == (5, 4)
    variants.now = "named"
    refused = r"timestep='t' is t \[2, .*which is no timestep: .*Name the input"
    with torch.no_grad(), pytest.raises(hero_fx.UnsupportedModel, match=refused):
        run(toys.latents(), TEXTS[what], toys.times(1)[0])


class Learned(nn.Module):
    """A small MLP in place of the sinusoid: only the name tells the time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.toy()
        self.mlp = nn.Linear(1, toys.WIDTH)

    def forward(self, latents: Tensor, pooled: Tensor, sigma: Tensor) -> Tensor:
        embedding = self.mlp(sigma[:, None]) + pooled.mean(-1, keepdim=True)
        x: Any = self.inner.first(latents)
        for block in self.inner.blocks:
            x = block(x, embedding[:, None])
        result: Tensor = self.inner.last(x)
        return result


def test_a_learned_embedding_of_time() -> None:
    run, backend = toys.compiled(tiny.randomized(Learned()))
    times = [time / 1000 for time in toys.times(9)]
    toys.loop(lambda x, time: run(x, TEXTS["pooled"], time), toys.latents(), times)
    assert backend.stats().cached_steps == 4


def test_names_choose_between_inputs_that_look_alike() -> None:
    class Guided(toys.ToyDiT):
        def forward(self, latents: Tensor, guidance: Tensor, timestep: Tensor) -> Any:  # type: ignore[override]
            return super().forward(latents + toys.sinusoid(guidance).mean(-1)[:, None, None], timestep)

    torch.manual_seed(0)
    run, backend = toys.compiled(tiny.randomized(Guided(2)))
    toys.loop(lambda x, time: run(x, torch.full((2,), 6.0), time), toys.latents(), toys.times(9))
    assert backend.stats().cached_steps == 4
