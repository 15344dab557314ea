"""FLOPs: counted from graphs, against counts by hand and one row of the paper at full size."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hero_fx
from hero_fx import Flops

from .support import tiny, toys
from .support.examples import example
from .support.tracing import trace

# A multiply-add is two operations.
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], Flops]] = {
    "linear, the bias is not counted": (
        F.linear,
        [(2, 3, 5), (7, 5), (7,)],
        Flops(gemm=2 * (2 * 3) * 5 * 7, attention=0),
    ),
    "matmul with weights": (torch.matmul, [(2, 3, 5, 7), (7, 11)], Flops(gemm=2 * (2 * 3) * 5 * 7 * 11, attention=0)),
    "matmul of two batches": (
        torch.matmul,
        [(2, 3, 5, 7), (2, 3, 7, 11)],
        Flops(gemm=0, attention=2 * (2 * 3) * 5 * 7 * 11),
    ),
    "convolution, stride 1": (
        F.conv2d,
        [(2, 3, 5, 7), (13, 3, 2, 2)],
        Flops(gemm=2 * (2 * 13 * 4 * 6) * (3 * 2 * 2), attention=0),
    ),
    "patches: a convolution whose stride is its kernel": (
        lambda x, w: F.conv3d(x, w, stride=(1, 2, 2)),
        [(2, 3, 5, 4, 6), (7, 3, 1, 2, 2)],
        Flops(gemm=2 * (2 * 7 * 5 * 2 * 3) * (3 * 1 * 2 * 2), attention=0),
    ),
    "self-attention": (
        F.scaled_dot_product_attention,
        [(2, 3, 5, 7)] * 3,
        Flops(gemm=0, attention=2 * (2 * 3) * 5 * 5 * (7 + 7)),
    ),
    "cross-attention, keys and values of other sizes": (
        F.scaled_dot_product_attention,
        [(2, 3, 5, 7), (2, 3, 11, 7), (2, 3, 11, 13)],
        Flops(gemm=0, attention=2 * (2 * 3) * 5 * 11 * (7 + 13)),
    ),
    "pointwise ops and norms are free": (
        lambda x: F.layer_norm(F.gelu(x) * x, (5,)).transpose(0, 1),
        [(2, 3, 5)],
        Flops(gemm=0, attention=0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_by_hand(name: str) -> None:
    function, shapes, wanted = CASES[name]
    assert hero_fx.flops(trace(function, *map(torch.empty, shapes))) == wanted


def test_flops_of_a_block_by_hand() -> None:
    """Both kinds in one graph: q, k, v and output projections, attention, FFN."""

    def block(x: Tensor, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in F.linear(x, qkv).chunk(3, dim=-1))
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), out)
        return x + F.linear(F.gelu(F.linear(x, up)), down)

    batch, tokens, width = 2, 5, 6
    shapes = [(batch, tokens, width), (3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    counted = hero_fx.flops(trace(block, *map(torch.empty, shapes)))
    assert counted.gemm == 2 * batch * tokens * width * (3 * width + width + 8 * width)
    assert counted.attention == 4 * batch * tokens**2 * width
    assert counted.total == counted.gemm + counted.attention


def test_counting_sets_no_hooks_on_the_modules_of_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace(torch.matmul, torch.empty(2, 3, 5, 7), torch.empty(7, 11))
    for hook in ("register_module_forward_pre_hook", "register_module_forward_hook"):
        monkeypatch.setattr("torch.utils.module_tracker." + hook, lambda *_: pytest.fail("a global hook is set"))
    assert hero_fx.flops(traced).gemm > 0


def test_flops_add_and_multiply() -> None:
    assert Flops(2, 3) + Flops(5, 7) * 10 == Flops(52, 73)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"policy": "hero", "num_steps": 10, "interval": 3}, "FFF00F00FF"),
        ({"policy": "fora", "interval": 2}, "FFF0F0F0F0"),
        ({"policy": "duca", "num_steps": 10, "interval": 4}, "FFF010F01F"),
        ({"policy": "duca", "schedule": (1, 0, 0, 0, 0, 1, 1, 0, 0, 1)}, "F0101FF01F"),
        ({"policy": "taylorseer", "interval": 1}, "FFFFFFFFFF"),
    ],
    ids=str,
)
def test_step_kinds(options: dict[str, Any], kinds: str) -> None:
    config = hero_fx.backend(**options).config
    policy = config.make_policy()
    assert policy is not None
    assert hero_fx.step_kinds(config, policy, 10) == [None if kind == "F" else int(kind) for kind in kinds]


def test_trajectory_flops_weigh_each_kind_by_its_steps() -> None:
    backend = hero_fx.backend("duca", num_steps=10, interval=4, grid=toys.GRID, refresh_ratio=0.4)
    steps = hero_fx.trace(toys.toy(layers=3), toys.latents(), toys.times(1)[0], backend=backend)
    full, refreshing, reusing = (hero_fx.flops(gm) for gm in (steps.full, *steps.cached))
    total = hero_fx.trajectory_flops(steps, backend.config, 10)
    assert total == full * 5 + refreshing * 3 + reusing * 2
    # Both kinds of cached step run the embeddings and the modulations; one runs the FFNs of 3 layers on 12 of 30 tokens.
    ffn = 2 * (toys.WIDTH * 2 * toys.WIDTH) * 2
    assert refreshing.gemm - reusing.gemm == 3 * (2 * 12) * ffn
    assert full.gemm - reusing.gemm == 3 * (2 * toys.TOKENS) * (ffn + 2 * toys.WIDTH * 4 * toys.WIDTH)
    assert full.attention == 3 * 4 * 2 * toys.TOKENS**2 * toys.WIDTH
    assert refreshing.attention == reusing.attention == 0


FORMS: tuple[Literal["literal"], Literal["collapsed"]] = ("literal", "collapsed")
DEPTH, TRACED = 42, (2, 4)


def test_full_size_rows_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aether, 42 layers and 14,850 tokens: the main row of the planning table, and the full compute it is held against.

    Layers are alike, so what 2 and 4 of them cost tells what 42 do.
    """
    paper_flops = example("paper_flops")
    rows = {row.name: row for row in paper_flops.rows()}
    assert rows["planning, HERO N=2"].options["refresh_layers"] == DEPTH // 2
    whole = paper_flops.CogVideoXTransformer3DModel

    def traced(layers: int) -> hero_fx.StepGraphs:
        def shorter(**config: Any) -> Any:
            assert config["num_layers"] == DEPTH
            return whole(**config | {"num_layers": layers})

        monkeypatch.setattr(paper_flops, "CogVideoXTransformer3DModel", shorter)
        return paper_flops.capture(2)  # type: ignore[no-any-return]

    few, more = map(traced, TRACED)

    def at_full_depth(count: Callable[[hero_fx.StepGraphs, int], int]) -> int:
        small, large = (count(steps, layers // 2) for steps, layers in zip((few, more), TRACED, strict=True))
        return small + (large - small) * (DEPTH - TRACED[0]) // (TRACED[1] - TRACED[0])

    for name, paper in (("planning, full compute", 14352.50), ("planning, HERO N=2", 8295.21)):
        row = rows[name]

        def products(steps: hero_fx.StepGraphs, shallow: int, row: Any = row) -> int:
            options = row.options | ({"refresh_layers": shallow} if row.options["policy"] == "hero" else {})
            return paper_flops.measure(replace(row, options=options), steps).gemm  # type: ignore[no-any-return]

        assert row.paper == paper
        assert at_full_depth(products) / 1e12 == pytest.approx(paper, rel=1e-3)
    # The matrix products that the collapsed form keeps, and state in bf16.
    hero: dict[str, Any] = {"policy": "hero", "keys": "sampled"}
    kept = [hero_fx.flops(hero_fx.backend(form=form, **hero).rewrite(more).cached[0]) for form in FORMS]
    assert kept[0] == kept[1]
    bounds: list[tuple[dict[str, Any], float]] = [
        ({}, 8.55e9),
        ({"unsampled": "reuse"}, 15.9e9),
        ({"policy": "lean"}, 0.555e9),
        ({"unsampled": "gate", "keys": "landmarks"}, 2.14e9),
    ]
    for options, most in bounds:
        backend = hero_fx.backend(**options, state_dtype=torch.bfloat16)

        def state(steps: hero_fx.StepGraphs, _: int, made: hero_fx.Backend = backend) -> int:
            return made.rewrite(steps).state_bytes

        assert 0.98 * most < at_full_depth(state) <= most


class Hidden(toys.ToyDiT):
    """Its FFNs are added in a form that no rule knows."""

    def __init__(self) -> None:
        super().__init__(2)
        self.wide = nn.ModuleList(nn.Linear(toys.WIDTH, toys.WIDTH) for _ in range(2))

    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        x, embedding = self.first(latents), self.time(toys.sinusoid(timestep))[:, None]
        for block, wide in zip(self.blocks, self.wide, strict=True):
            x = torch.lerp(block(x, embedding), wide(x), 0.5)
        result: Tensor = self.last(x)
        return result


def test_what_no_branch_holds_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = tiny.randomized(Hidden())
    call, backend = toys.compiled(model, policy="fora", grid=None)
    with caplog.at_level(logging.WARNING, "hero_fx"):
        toys.loop(call, toys.latents(), toys.times(9))
    (record,) = [r for r in caplog.records if "outside of any branch" in r.message]
    tokens, width, products = toys.TOKENS, toys.WIDTH, 2 * 2
    outside = products * (2 * tokens * (width * width + toys.CHANNELS * width) + width * width + 2 * 6 * width * width)
    total = hero_fx.flops(backend.graphs[-1].normal).total
    assert re.match(
        rf"{outside / total:.0%} of a full step's FLOPs .*wide\.0.*updates of the residual stream", record.message
    )
    report = str(hero_fx.explain(backend))
    assert f"outside of any branch, computed at every step: {outside / total:.1%} of a full step's FLOPs" in report
    assert "note: " + record.message in report


def test_what_no_branch_holds_is_little_in_a_model_of_many_tokens(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "hero_fx"):
        hero_fx.backend(inner="eager", policy="fora")(*captured_graph())
    assert "outside of any branch" not in caplog.text


def captured_graph() -> Any:
    graph = tiny.captured(layers=4)
    return graph.gm, graph.inputs
