"""Calibrated coefficients on features: the pass, trajectories against the reference, and Taylor's own coefficients."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import hero_fx
from hero_fx.passes.render import graph_diff, render
from hero_fx.passes.rewrite.plan import Extrapolate, Full
from hero_fx.passes.rewrite.weigh import WeighFeatures
from hero_fx.passes.slots import FeatureSlot, ScalarSlot, TableSlot, slots_of
from hero_fx.plan import Plan, Timeline

from .reference import Config, trajectory
from .support import tiny
from .support.steps_by_hand import Toy, ffns
from .support.tracing import run_passes

STEPS, LAYERS = 10, 4
MASK = tuple(map(bool, (1, 1, 1, 0, 0, 1, 0, 0, 1, 0)))
WIDTH = 32
TIMES = tuple(float(t) for t in tiny.timesteps(STEPS))
ANY = hero_fx.Fingerprint()


def test_weights_take_the_place_of_powers_of_x() -> None:
    toy = Toy(ffns)
    gm = toy.cached(toy.plan(Extrapolate(), Full()))
    before = render(gm)
    run_passes(gm, WeighFeatures(tables={"l0_ffn_image": (4,)}))
    assert_expected_inline(
        graph_diff(before, gm),
        """\
  ...
  l0_ffn_image_y0: f32[2, 6, 4] = input
  l0_ffn_image_y1: f32[2, 6, 4] = input
- x: f32[] = input
- mul_tensor: f32[2, 6, 4] = aten.mul.Tensor(l0_ffn_image_y1, x)
- add_tensor: f32[2, 6, 4] = aten.add.Tensor(l0_ffn_image_y0, mul_tensor)
+ l0_ffn_image_y1_weight: f32[4] = input
+ l0_ffn_image_y0_weight: f32[4] = input
+ mul_tensor_1: f32[2, 6, 4] = aten.mul.Tensor(l0_ffn_image_y1, l0_ffn_image_y1_weight)
+ mul_tensor_2: f32[2, 6, 4] = aten.mul.Tensor(l0_ffn_image_y0, l0_ffn_image_y0_weight)
+ add_tensor: f32[2, 6, 4] = aten.add.Tensor(mul_tensor_2, mul_tensor_1)
  add: f32[2, 6, 4] = aten.add.Tensor(x_1, add_tensor)
  layer_norm_1: f32[2, 6, 4] = aten.layer_norm.default(add, [4])
  ...""",
    )


def test_without_extrapolation_nothing_fires() -> None:
    toy = Toy(ffns)
    gm = toy.cached(toy.plan(Full()))
    before = render(gm)
    (record,) = run_passes(gm, WeighFeatures(tables={}))
    assert record.sites == 0
    assert render(gm) == before


def test_features_without_coefficients_are_refused() -> None:
    toy = Toy(ffns)
    gm = toy.cached(toy.plan(Extrapolate(), Full()))
    with pytest.raises(ValueError, match=r"no coefficients for the features 'l0_ffn_image' .* 'other'"):
        run_passes(gm, WeighFeatures(tables={"other": (4,)}))
    with pytest.raises(ValueError, match=r"shape \[3\], and the features have 4 channels"):
        run_passes(gm, WeighFeatures(tables={"l0_ffn_image": (3,)}))


def test_terms_have_their_features_in_common() -> None:
    first, second = (FeatureSlot("l0_attention", "text+image", 0, term, merged=True) for term in (0, 1))
    assert first.features == second.features == "sum_l0_attention_text_image"
    assert [first.name, second.name] == ["sum_l0_attention_text_image_y0", "sum_l0_attention_text_image_y1"]


# ---------------------------------------------------------------------------------------------------- trajectories
@cache
def steps_of(policy: str) -> hero_fx.StepGraphs:
    graph = tiny.captured(layers=LAYERS)
    return hero_fx.backend(policy, **POLICIES[policy][0]).trace(graph.gm, graph.inputs)


def families(policy: str) -> list[str]:
    """The features that a policy extrapolates, by the names of their state."""
    slots = [spec.slot for spec in steps_of(policy).state]
    return [slot.features for slot in slots if isinstance(slot, FeatureSlot) and slot.term == 1]


def taylor(terms: int, *shape: int) -> Tensor:
    table = torch.zeros(STEPS, terms, *shape)
    last = 0
    for step, full in enumerate(MASK):
        last = step if full else last
        for i in range(terms):
            table[step, i] = (step - last) ** i / math.factorial(i)
    return table


def plan_of(policy: str, tables: dict[str, Tensor], options: dict[str, Any]) -> Plan:
    line = Timeline(schedule=MASK, timesteps=TIMES, coefficients=tables)
    return Plan(policy=policy, timelines=(line,), options=options, model=ANY)


def compiled(plan: Plan | None, **options: Any) -> tuple[list[Tensor], hero_fx.Backend]:
    more: dict[str, Any] = {"plan": plan, "plan_mismatch": "warn"} if plan else {"schedule": MASK}
    backend = hero_fx.backend(**{"inner": tiny.INNER, **options, **more})
    graph = tiny.captured(layers=LAYERS)
    return tiny.denoise(graph.compiled(backend), tiny.inputs(), tiny.timesteps(STEPS)), backend


@cache
def uncalibrated(policy: str) -> list[Tensor]:
    return compiled(None, policy=policy, **POLICIES[policy][0])[0]


POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hero": ({}, {"policy": "hero", "refresh_layers": 2, "unsampled": "extrapolate"}),
    "lean": ({}, {"policy": "hero", "refresh_layers": 2, "keys": "sampled"}),
    "taylorseer": ({"cache_point": "post_gate", "order": 2}, {"policy": "taylorseer", "order": 2}),
}


@pytest.mark.filterwarnings("ignore:hero_fx. the plan was calibrated on another model")
@pytest.mark.parametrize("policy", list(POLICIES))
def test_trajectories_equal_the_reference(policy: str) -> None:
    options, reference = POLICIES[policy]
    terms = options.get("order", 1) + 1
    generator = torch.Generator().manual_seed(5)
    tables = {
        name: taylor(terms, WIDTH) * (1 + 0.2 * torch.randn(STEPS, terms, WIDTH, generator=generator))
        for name in families(policy)
    }
    for name, table in tables.items():
        if policy == "hero" and "l0" in name:
            table[:, 0] = 1  # of refreshed features: see `WeighFeatures`
    ours, backend = compiled(plan_of(policy, tables, options))
    model, kwargs, selections = tiny.cogvideox(layers=LAYERS), tiny.inputs(), backend.steppers[0].selections
    latents = kwargs["hidden_states"]
    images = {name: table for name, table in tables.items() if "image" in name}
    texts = {name: table for name, table in tables.items() if "text" in name}

    def weights(step: int, layer: int, term: int) -> Tensor:
        def of(known: dict[str, Tensor]) -> Tensor:
            shallow = [table for name, table in known.items() if "l0_" in name]
            deep = [table for name, table in known.items() if "l0_" not in name] or shallow
            return (shallow or deep if layer < 2 else deep)[0][step, term]

        rows = torch.ones(tiny.TEXT + math.prod(tiny.GRID), WIDTH)
        rows[: tiny.TEXT], rows[tiny.TEXT :] = of(texts) if texts else 1.0, of(images)
        return rows

    def inputs(step: int) -> dict[str, Any]:
        return {**kwargs, "hidden_states": latents, "timestep": tiny.timesteps(STEPS)[step].expand(2)}

    def indices(step: int, layer: int) -> Tensor:
        assert selections is not None
        return selections.at(MASK[: step + 1])[0]

    config = Config(**reference, cache_point=("post_gate", "post_gate"))
    theirs = []
    with torch.no_grad():
        for out in trajectory(model, config, MASK, indices if selections else None, inputs, weights):
            theirs.append(out)
            latents = latents - out / STEPS
    assert tiny.worst(ours, theirs) < 1e-5


@pytest.mark.filterwarnings("ignore:hero_fx. the plan was calibrated on another model")
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize(
    "channels",
    [
        pytest.param((), id="scalars"),
        # Also in `test_trajectories_equal_the_reference`.
        pytest.param((WIDTH,), id="channels", marks=pytest.mark.exhaustive),
    ],
)
def test_taylors_coefficients_give_the_uncalibrated_result(policy: str, channels: tuple[int, ...]) -> None:
    options, _ = POLICIES[policy]
    terms = options.get("order", 1) + 1
    tables = {name: taylor(terms, *channels) for name in families(policy)}
    planned, _ = compiled(plan_of(policy, tables, options))
    assert tiny.worst(planned, uncalibrated(policy)) < 1e-6


@pytest.mark.parametrize("policy", list(POLICIES))
def test_without_a_plan_graphs_have_no_tables(policy: str) -> None:
    steps = steps_of(policy)
    slots = [slot for gm in (steps.full, *steps.cached) for _, slot in slots_of(gm)]
    assert any(isinstance(slot, ScalarSlot) for slot in slots)
    assert not any(isinstance(slot, TableSlot) for slot in slots)


@pytest.mark.filterwarnings("ignore:hero_fx. the plan was calibrated on another model")
def test_a_plan_for_other_features_is_refused() -> None:
    with pytest.raises((ValueError, BackendCompilerFailed), match="no coefficients for the features"):
        compiled(plan_of("hero", {"other": taylor(2)}, {}))
