"""bfloat16: the collapsed form strays from a float32 reference no further than the literal one."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx

from .reference import Config
from .support import tiny
from .test_exactness import reference_outputs

STEPS, LAYERS = 9, 4
PRE, POST = ("pre_gate", "post_gate"), ("post_gate", "post_gate")
HERO: dict[str, Any] = {"policy": "hero", "refresh_layers": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, HERO | {"cache_point": POST, "unsampled": "extrapolate"}),
    "reuse": ({"unsampled": "reuse"}, HERO | {"cache_point": PRE}),
    "lean": ({"policy": "lean"}, HERO | {"cache_point": POST, "keys": "sampled"}),
    "fora": ({"policy": "fora", "cache_point": "post_gate"}, {"policy": "fora", "cache_point": POST}),
    "taylorseer": ({"policy": "taylorseer", "cache_point": "post_gate"}, {"policy": "taylorseer", "cache_point": POST}),
}


def halved(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(v.bfloat16() for v in value) if isinstance(value, tuple) else value.bfloat16()
        for name, value in kwargs.items()
    }


@cache
def in_bfloat16(batch: int = 2) -> tiny.Captured:
    return tiny.Captured(tiny.cogvideox(layers=LAYERS).bfloat16(), halved(tiny.inputs(batch=batch)))


def strays(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative L2 distance of the whole trajectory of outputs."""
    a, b = torch.stack([out.float() for out in ours]), torch.stack(theirs)
    return float((a - b).norm() / b.norm())


def widened(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same rounded inputs in float32: what differs is the arithmetic."""
    return {
        name: tuple(v.bfloat16().float() for v in value) if isinstance(value, tuple) else value.bfloat16().float()
        for name, value in kwargs.items()
    }


# FORA's sums of caches are a part of what HERO sums by default; with "reuse" fewer caches are summed.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.exhaustive if case in ("fora", "reuse") else ()) for case in CASES]
)
def test_collapsed_is_no_worse_than_literal(case: str) -> None:
    options, reference = CASES[case]
    model = tiny.cogvideox(layers=LAYERS).bfloat16().float()
    # Rounding is a matter of luck from value to value; over the seeds' many values it is not.
    starts = [tiny.inputs(seed=seed) for seed in range(3)]
    theirs: list[list[Tensor]] = []
    distances = {}
    for form in ("literal", "collapsed"):
        backend = hero_fx.backend(inner=tiny.INNER, num_steps=STEPS, interval=3, form=form, **options)
        run = in_bfloat16().compiled(backend)
        theirs = theirs or [
            reference_outputs(model, backend, Config(**reference), widened(start), STEPS) for start in starts
        ]
        distances[form] = 0.0
        for start, exact in zip(starts, theirs, strict=True):
            backend.reset()
            distances[form] += strays(tiny.denoise(run, halved(start), tiny.timesteps(STEPS)), exact) / 3
    assert 1e-4 < distances["collapsed"] < 0.05, "bfloat16 rounds to 3 significant digits"
    assert distances["collapsed"] <= 1.1 * distances["literal"]
