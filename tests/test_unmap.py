"""`without_maps`: the graph before and after, where nothing is to be done, numerics. End to end: flex models of test_zoo.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import hero_fx
from hero_fx.build import normalized
from hero_fx.passes.normalize.unmap import without_maps
from hero_fx.passes.render import render

from .support.tracing import capture, equal


def counts(x: Tensor, rows: Tensor) -> Tensor:
    """A tensor that is made within the map is written to in place."""

    def one(values: Tensor, row: Tensor) -> Tensor:
        return values.new_zeros(5).index_put((row,), values, accumulate=True)

    mapped: Tensor = torch.vmap(one)(x.sin(), rows)
    return mapped.cos()


def nested(x: Tensor, y: Tensor) -> Tensor:
    """All pairs of two axes, and what comes in from outside of both maps."""
    scale = x.mean()
    pairs = torch.vmap(lambda a: torch.vmap(lambda b: (a - b).abs().sum() * scale)(y))(x)
    sums: Tensor = pairs + torch.vmap(torch.sum)(y)
    return sums


def plain(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.transpose(0, 1)


ROWS = torch.tensor([[0, 3, 3, 1], [2, 2, 2, 4], [1, 0, 1, 0]])
X = torch.linspace(-1, 1, 12).reshape(3, 4)


def test_graph() -> None:
    normal, _ = normalized(*capture(counts, X, ROWS))
    assert_expected_inline(
        render(normal),
        """\
x: f32[3, 4] = input
rows: i64[3, 4] = input
sin: f32[3, 4] = aten.sin.default(x)
new_zeros: f32[3, 5] = aten.new_zeros.default(sin, [3, 5], pin_memory=False)
arange: i64[3] = aten.arange.default(3, dtype=i64, layout=strided, device=cpu)
unsqueeze: i64[3, 1] = aten.unsqueeze.default(arange, -1)
index_put: f32[3, 5] = aten.index_put.default(new_zeros, [unsqueeze, rows], sin, True)
cos: f32[3, 5] = aten.cos.default(index_put)
return (cos,)""",
    )


@pytest.mark.parametrize(("function", "inputs"), [(counts, (X, ROWS)), (nested, (X, X[:2].cos()))])
def test_numerics(function: Any, inputs: tuple[Tensor, ...]) -> None:
    gm, values = capture(function, *inputs)
    written = without_maps(gm, values)
    assert written is not gm
    assert equal(written(*values), function(*inputs))
    assert equal(normalized(gm, values)[0](*values), function(*inputs))


def test_must_not_fire() -> None:
    gm, values = capture(plain, X, X)
    assert without_maps(gm, values) is gm


class Blocks(nn.Module):
    """Two layers of flex attention, whose mask is built at each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 32, 32, device="cpu", BLOCK_SIZE=16)
        x = x * 2
        for qkv, up in zip(self.qkv, self.up, strict=True):
            q, k, v = qkv(x * timestep.cos()).unsqueeze(1).chunk(3, dim=-1)
            x = x + flex_attention(q, k, v, block_mask=mask).squeeze(1)
            x = x + up(x.sin())
        return x * 2


@pytest.mark.filterwarnings("ignore")  # flex attention's own, of eager runs
def test_a_block_mask_made_within_the_model() -> None:
    model, inputs = Blocks().eval().requires_grad_(False), (torch.randn(2, 32, 16), torch.tensor(0.9))
    backend = hero_fx.backend(policy="fora", schedule=[True, False], inner="aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert equal(compiled(*inputs), model(*inputs))
        compiled(inputs[0], inputs[1] / 2)
    assert (backend.stats().full_steps, backend.stats().cached_steps) == (1, 1)
