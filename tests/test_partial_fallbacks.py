"""Branches that some policy cannot cache or refresh are computed in full, or the error says why not."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hero_fx
from hero_fx.passes.render import op_count

from .support import tiny, toys
from .support.unsupported import TIME, backend, check_message, frozen

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class WrittenOut(toys.ToyDiT):
    """Attention as a product of queries and keys, and a softmax."""

    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        x = self.first(latents) * timestep[:, None, None]
        for block in self.blocks:
            assert isinstance(block, toys.Block)
            q, k, v = block.qkv(x).chunk(3, dim=-1)
            x = x + (q @ k.transpose(1, 2)).softmax(-1) @ v
            x = x + block.down(block.up(x).relu())
        result: Tensor = self.last(x)
        return result


class Rolling(toys.Block):
    """Its FFN looks at other tokens in a way that the analysis of token axes does not know."""

    def forward(self, x: Tensor, embedding: Tensor) -> Any:
        x = super().forward(x, embedding)
        return x + embedding * self.down(self.up(x).cumsum(dim=1).relu())


def test_written_out_attention_is_cached_but_not_refreshed() -> None:
    """A product of values with each other tells it; which tokens its softmax goes over, no rule says."""
    torch.manual_seed(0)
    model, time = frozen(WrittenOut()), toys.times(1)[0]
    steps = hero_fx.trace(model, toys.latents(), time, backend=backend(refresh_layers=1))
    assert [branch.kind for branch in steps.structure.branches] == ["attention", "ffn"] * len(model.blocks)
    assert [fallback.branch for fallback in steps.fallbacks] == ["l0_attention"]
    (cached,) = steps.cached
    ops = op_count(cached)
    assert (ops["aten.softmax"], op_count(steps.full)["aten.softmax"]) == (1, len(model.blocks))


def test_a_branch_that_cannot_be_refreshed_is_computed_in_full() -> None:
    model = toys.toy()
    torch.manual_seed(1)
    model.blocks[1] = frozen(Rolling())
    hero = backend(refresh_layers=2, warmup=1)
    call = toys.torch_compile(model, backend=hero, fullgraph=True)
    fix = r"l1_ffn\w* cannot be cached as planned and is computed in full at every step: .*cumsum"
    with pytest.warns(UserWarning, match=fix) as caught:
        ours = toys.loop(call, toys.latents(), toys.times(2))
    assert len(caught) == 1
    plain = toys.loop(model, toys.latents(), toys.times(2))
    assert torch.equal(ours[0], plain[0])
    assert 0 < tiny.worst(ours, plain) < 0.5
    assert [fallback.branch for fallback in hero.graphs[0].fallbacks] == ["l1_ffn_2"]


class Unsized(toys.ToyDiT):
    """Text in front of the image, cut to the length that its mask has: how many tokens, only a value tells."""

    def forward(self, latents: Tensor, timestep: Any, mask: Tensor) -> Any:  # type: ignore[override]
        x, embedding = self.first(latents), self.time(toys.sinusoid(timestep))[:, None]
        count = mask.sum().item()
        torch._check(count >= 2)
        torch._check(count <= 9)
        x = torch.cat([x[:, :9][:, :count], x], 1)
        for block in self.blocks:
            x = block(x, embedding)
        return self.last(x[:, -toys.TOKENS :])


def test_a_number_of_tokens_that_only_values_tell() -> None:
    torch.manual_seed(0)
    model, mask = frozen(Unsized(layers=2)), torch.tensor([1, 1, 1, 0, 1])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        fix = r"its number of tokens depends on the values of an input.*cut the input to its length before the call"
        call = toys.torch_compile(model, backend=backend(), fullgraph=True)
        check_message(lambda: call(toys.latents(), TIME, mask), fix, ValueError)
        torch._dynamo.reset()
        lenient = toys.torch_compile(model, backend=backend(strict=False), fullgraph=True)
        with torch.no_grad(), pytest.warns(UserWarning, match="without step caching: the residual stream at"):
            ours = lenient(toys.latents(), TIME, mask)
        assert torch.equal(ours, model(toys.latents(), TIME, mask))


class SequenceFirst(toys.Block):
    """An FFN that works on [tokens, batch, width], where a table per token meets it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(toys.TOKENS, 1, toys.WIDTH))

    def forward(self, x: Tensor, embedding: Tensor) -> Any:
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden = self.up(x.transpose(0, 1) * self.table).relu()
        return x + embedding * self.down(hidden).transpose(0, 1)


@pytest.mark.parametrize(
    ("policy", "batch"),
    [
        ("toca", toys.TOKENS),
        ("duca", 2),
        pytest.param("toca", 2, marks=pytest.mark.exhaustive),
        pytest.param("duca", toys.TOKENS, marks=pytest.mark.exhaustive),
    ],
)
def test_tokens_by_score_where_the_batch_is_not_in_front(policy: str, batch: int) -> None:
    """Computed in full, and said so; also where the batch is as long as the sequence, so that sizes tell nothing."""
    torch.manual_seed(0)
    model = toys.ToyDiT(2)
    model.blocks = nn.ModuleList(SequenceFirst() for _ in range(2))
    frozen(model)
    hero = backend(policy=policy, refresh_ratio=1.0, interval=2, inner="aot_eager")
    call, times, start = toys.torch_compile(model, backend=hero), toys.times(6, batch), toys.latents(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toys.loop(call, start, times)
    said = [re.match(r"hero_fx: (\w+) cannot be cached as planned", str(w.message)) for w in caught]
    assert [found and found[1] for found in said] == ["l0_ffn", "l1_ffn"]
    assert [f.branch for f in hero.graphs[-1].fallbacks] == ["l0_ffn", "l1_ffn"]
    assert hero.stats().cached_steps
