"""Real pipelines of diffusers end to end: nothing but `pipe.transformer = torch.compile(...)`."""

from __future__ import annotations

from typing import Any

import pytest

import hero_fx

from .support import tiny, toys
from .support.diffusion_pipelines import PIPELINES, STEPS, latents_of, modular_wan
from .support.tiny import worst
from .support.tracing import Variants

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

RUNS = 2
FULLS, CACHED = 3, 5  # steps 0, 3 and 6 of eight
SETTINGS: dict[str, Any] = {"inner": tiny.INNER, "interval": 3, "warmup": 1, "patch": (1, 1, 2), "refresh_ratio": 0.4}
# Every layer recomputes every token, so that cached steps must give what full ones do.
ALL: dict[str, Any] = {**SETTINGS, "refresh_layers": 1.0, "refresh_ratio": 1.0, "text": "live"}


# What they show, another one shows too: of HunyuanVideo, calls with texts of two lengths wan_t2v, masks ltx; of SD 3, guidance
# in one batch cogvideox_t2v; of timesteps per token, test_runtime.py.
ALIKE = ("cogvideox_i2v", "cosmos", "flux", "hunyuan_video", "qwen_image", "sd3", "wan_i2v", "wan_ti2v")
ROWS = [
    pytest.param(name, marks=pytest.mark.exhaustive if name in ALIKE else ())
    for name in PIPELINES
    if name != "wan_two_experts"
]


@pytest.mark.parametrize("name", ROWS)
def test_pipelines(name: str) -> None:
    case = PIPELINES[name]()
    hero = hero_fx.backend(**SETTINGS, **case.options)
    exact = hero_fx.backend(**ALL, **case.options)
    variants = Variants(hero=hero, exact=exact)
    case.pipe.transformer = toys.torch_compile(case.pipe.transformer, backend=variants, fullgraph=True)
    plain = latents_of(case)

    variants.now = "exact"
    for _ in range(RUNS):
        assert worst(latents_of(case), plain) < 1e-4

    variants.now = "hero"
    first, decoded = latents_of(case), case.run(output_type="pt")
    assert worst(first[:1], plain[:1]) == 0
    assert 1e-4 < worst(first, plain) < 1
    assert tuple(decoded.shape) == case.decoded
    assert bool(decoded.isfinite().all())

    assert not any(graphs.fallbacks for graphs in exact.graphs)
    for backend in (exact, hero):
        stats = backend.stats()
        assert stats.graphs == case.graphs
        assert (stats.full_calls, stats.cached_calls) == (RUNS * case.lanes * FULLS, RUNS * case.lanes * CACHED)
    assert FULLS + CACHED == STEPS
    assert toys.same(latents_of(case), first)


def test_two_experts() -> None:
    """One backend serves both; each has its own trajectory, and the second starts in the middle of the loop."""
    case = PIPELINES["wan_two_experts"]()
    plain = latents_of(case)
    exact = hero_fx.backend(**ALL)
    for part in ("transformer", "transformer_2"):
        setattr(case.pipe, part, toys.torch_compile(getattr(case.pipe, part), backend=exact, fullgraph=True))
    with pytest.warns(UserWarning, match="another model takes over in the middle of a trajectory.*full steps"):
        first = latents_of(case)
    for run in (first, latents_of(case)):
        assert worst(run, plain) < 1e-4
    steps = int((case.pipe.scheduler.timesteps >= 875).sum())
    fulls = [
        len({step for step in (0, 3, 6) if step < steps}),
        len({steps} | {step for step in (3, 6) if step > steps}),
    ]
    assert 1 < steps < STEPS - 1
    assert exact.stats().full_calls == RUNS * case.lanes * sum(fulls)
    assert exact.stats().cached_calls == RUNS * case.lanes * (STEPS - sum(fulls))


def test_modular_pipeline() -> None:
    """Blocks in place of a pipeline."""
    pipe, call = modular_wan()
    plain = pipe(**call)
    exact = hero_fx.backend(**ALL)
    pipe.update_components(transformer=toys.torch_compile(pipe.transformer, backend=exact, fullgraph=True))
    for _ in range(RUNS):
        assert worst([pipe(**call)], [plain]) < 1e-4
    assert (exact.stats().full_calls, exact.stats().cached_calls) == (RUNS * 2 * FULLS, RUNS * 2 * CACHED)
