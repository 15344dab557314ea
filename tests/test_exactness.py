"""Compiled trajectories against the eager reference, step by step.

All options run on the step graphs as they are; `AOT` has each of them once more through AOTAutograd, most of them where
exhaustive tests are asked for. Through Inductor: test_inductor.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx

from .reference import Config, trajectory
from .support import tiny

STEPS, LAYERS = 9, 3


def reference_outputs(
    model: Any, backend: hero_fx.Backend, config: Config, kwargs: dict[str, Any], steps: int
) -> list[Tensor]:
    """The same closed loop, with the tokens that the backend selects."""
    schedule = backend.config.make_schedule()
    mask = [schedule.is_full(step) for step in range(steps)]
    selections = backend.steppers[0].selections
    latents = kwargs["hidden_states"]
    times = tiny.timesteps(steps)

    def inputs(step: int) -> dict[str, Any]:
        return {**kwargs, "hidden_states": latents, "timestep": times[step].expand(latents.shape[0])}

    def indices(step: int, layer: int) -> Tensor:
        assert selections is not None
        drawn = selections.at(tuple(mask[: step + 1]))
        return drawn[layer if len(drawn) > 1 else 0]

    outputs = []
    with torch.no_grad():
        for out in trajectory(model, config, mask, indices if selections else None, inputs):
            outputs.append(out)
            latents = latents - out / steps
    return outputs


@cache
def model_of(layers: int, rotary: bool) -> Any:
    return tiny.cogvideox(layers=layers, rotary=rotary)


@cache
def plain_outputs(layers: int, rotary: bool, batch: int, steps: int) -> list[Tensor]:
    return tiny.denoise(model_of(layers, rotary), tiny.inputs(batch=batch, rotary=rotary), tiny.timesteps(steps))


def check(
    reference: dict[str, Any],
    *,
    rotary: bool = True,
    batch: int = 2,
    inner: str = tiny.INNER,
    bound: float = 1e-5,
    steps: int = STEPS,
    layers: int = LAYERS,
    **options: Any,
) -> hero_fx.Backend:
    model, graph = model_of(layers, rotary), tiny.captured(layers=layers, rotary=rotary, batch=batch)
    backend = hero_fx.backend(inner=inner, num_steps=steps, **options)
    kwargs = tiny.inputs(batch=batch, rotary=rotary)
    ours = tiny.denoise(graph.compiled(backend), kwargs, tiny.timesteps(steps))
    theirs = reference_outputs(model, backend, Config(**reference), kwargs, steps)
    assert backend.stats().cached_steps > 0
    assert tiny.worst(ours, theirs) < bound
    assert tiny.worst(ours, plain_outputs(layers, rotary, batch, steps)) > 1e-4, (
        "caching changed nothing: the comparison shows nothing"
    )
    return backend


HERO: dict[str, Any] = {
    "policy": "hero", "refresh_layers": 2, "cache_point": ("post_gate", "post_gate"), "unsampled": "extrapolate",
}  # fmt: skip
PAPER = HERO | {"cache_point": ("pre_gate", "post_gate"), "unsampled": "reuse"}


POINTS = ("pre_gate", "post_gate")


def further(*rows: tuple[Any, ...]) -> list[Any]:
    """Rows that are left out unless asked for."""
    return [pytest.param(*row, marks=pytest.mark.exhaustive) for row in rows]


MODELS = pytest.mark.parametrize(("rotary", "batch"), [(False, 1), (True, 2)], ids=["sincos", "rotary"])


@MODELS
@pytest.mark.parametrize("form", ["literal", "collapsed"])
def test_hero_as_it_is_by_default(batch: int, rotary: bool, form: str) -> None:
    check(HERO, batch=batch, rotary=rotary, form=form)


@pytest.mark.parametrize(
    ("interval", "form"), [(2, "literal"), (4, "collapsed"), *further((2, "collapsed"), (4, "literal"))]
)
def test_hero_as_in_the_paper(interval: int, form: str) -> None:
    """`unsampled="reuse"` alone gives Eq. 4, on features before the gate."""
    check(PAPER, form=form, interval=interval, unsampled="reuse")


KEYS = ("sampled", "sampled+text", "landmarks", "all")
# Every two values of two options meet in some row, but for "gate" in front of the gate, which is refused.
PAIRS = [
    (keys, ("skip", "live")[(i // 2 + j) % 2], how, "post_gate" if how == "gate" else POINTS[(i + j) % 2])
    for i, keys in enumerate(KEYS)
    for j, how in enumerate(("reuse", "extrapolate", "gate"))
]


@pytest.mark.parametrize(("keys", "text", "unsampled", "shallow"), PAIRS)
def test_hero_keys_text_unsampled_and_gate(keys: str, text: str, unsampled: str, shallow: str) -> None:
    points = (shallow, "post_gate")
    choice: dict[str, Any] = {"keys": keys, "text": text, "unsampled": unsampled, "cache_point": points}
    check(HERO | choice, interval=3, **choice)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": [1, 1, 1, 0, 0, 1, 0, 0, 0]},
        {"interval": 4},
        {"schedule": "toca", "interval": 3},
        {"selection": "per_layer", "interval": 3},
        {"age_weighting": False, "interval": 3},
        {"patch": (2, 3, 4), "refresh_ratio": 0.3, "interval": 3},
        {"seed": 7, "refresh_ratio": 5 / 6},
        {"warmup": 1, "cooldown": 0, "interval": 3},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_hero_schedules_and_selections(options: dict[str, Any]) -> None:
    check(HERO, **options)


# Every two values of two of them meet in some row.
@pytest.mark.parametrize(
    ("layers", "deep", "order"),
    [(layers, deep, 1 + (i + j) % 2) for i, layers in enumerate((0, 1, LAYERS)) for j, deep in enumerate(POINTS)],
)
def test_hero_boundary_gate_and_order(layers: int, deep: str, order: int) -> None:
    points = ("pre_gate", deep)
    choice: dict[str, Any] = {"refresh_layers": layers, "order": order, "cache_point": points}
    check(HERO | choice, interval=3, **choice)


BASELINES: list[tuple[str, dict[str, Any], str]] = [
    ("fora", {}, "pre_gate"),
    ("fora", {}, "post_gate"),
    ("taylorseer", {"order": 1}, "pre_gate"),
    ("taylorseer", {"order": 2}, "post_gate"),
    ("toca", {"text": "skip"}, "pre_gate"),
    ("toca", {"text": "live"}, "post_gate"),
    ("duca", {"text": "skip"}, "post_gate"),
    ("duca", {"text": "live"}, "pre_gate"),
]
OTHER_POINT = [(policy, options, POINTS[1 - POINTS.index(point)]) for policy, options, point in BASELINES]
"""Exhaustive rows; those of FORA, which has no further option, are `BASELINES`'."""


@pytest.mark.parametrize(
    ("policy", "options", "point"),
    [*BASELINES, *further(*(row for row in OTHER_POINT if row not in BASELINES))],
    ids=lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else o,
)
def test_baselines(policy: str, options: dict[str, Any], point: str) -> None:
    """Each policy on both models, in turns."""
    row = (policy, options, point)
    rotary = (BASELINES.index(row) if row in BASELINES else OTHER_POINT.index(row)) % 2 == 0
    reference = {"policy": policy, "cache_point": (point, point), "interval": 3, **options}
    if policy in ("toca", "duca"):
        reference |= {"grid": tiny.GRID, "ratio": 0.25}
        options = options | {"refresh_ratio": 0.25}
    check(reference, policy=policy, interval=3, cache_point=point, batch=1 + rotary, rotary=rotary, **options)


TOKENS: dict[str, Any] = {"grid": tiny.GRID, "ratio": 0.25}  # the reference's names
# Options of the backend, and what the reference is told beside them.
AOT: list[Any] = [
    ({}, HERO),
    ({"unsampled": "gate", "keys": "landmarks", "text": "live"}, HERO),
    ({"selection": "per_layer", "keys": "all", "text": "live", "cache_point": ("pre_gate", "post_gate")}, HERO),
    *further(
        ({"policy": "duca", "refresh_ratio": 0.25, "text": "skip", "cache_point": "post_gate"}, TOKENS),
        ({"unsampled": "reuse"}, PAPER),
        ({"keys": "sampled+text", "cache_point": ("pre_gate", "pre_gate"), "order": 2}, HERO),
        ({"policy": "taylorseer", "order": 2, "cache_point": "pre_gate"}, {}),
        ({"policy": "fora", "cache_point": "post_gate"}, {}),
        ({"policy": "toca", "refresh_ratio": 0.25, "text": "live", "cache_point": "pre_gate"}, TOKENS),
        ({"form": "literal"}, HERO),
        ({"unsampled": "reuse", "keys": "sampled", "text": "live"}, PAPER),
        ({"unsampled": "gate", "keys": "all"}, HERO),
    ),
]
NOT_OF_THE_REFERENCE = ("form", "selection", "refresh_ratio")


@pytest.mark.parametrize(("options", "reference"), AOT, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_through_aot_autograd(options: dict[str, Any], reference: dict[str, Any]) -> None:
    """One refreshed layer and one that is extrapolated, or two of any other policy."""
    shared = {name: value for name, value in options.items() if name not in NOT_OF_THE_REFERENCE}
    point = shared.get("cache_point")
    if isinstance(point, str):
        shared["cache_point"] = (point, point)
    wanted = reference | shared | {"interval": 3}
    if wanted["policy"] == "hero":
        wanted["refresh_layers"] = 1
    check(wanted, interval=3, layers=2, inner="aot_eager", **options)
