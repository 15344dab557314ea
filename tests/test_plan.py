"""The plan's file, what it refuses, and what it decides for a backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Fingerprint, Plan, Timeline

MASK = (True, True, False, True)
RULE = OutputRule(index=0, axis=1, latent="hidden_states", start=2)


def line(steps: int = 4, **more: Any) -> Timeline:
    known: dict[str, Any] = {
        "schedule": (MASK * steps)[:steps],
        "timesteps": tuple(float(900 - i) for i in range(steps)),
        "coefficients": {"out0": torch.randn(steps, 5, 1, 3, generator=torch.Generator().manual_seed(steps))},
        "error": {"rgb": 0.0125},
        "speed": 2.5,
    }
    return Timeline(**known | more)


def plan(*lines: Timeline, **more: Any) -> Plan:
    model = Fingerprint(name="Model", config={"layers": 3, "sizes": [1, 2]}, depth=3, width=8, outputs=((3,),))
    known: dict[str, Any] = {
        "policy": "forecast",
        "outputs": (RULE,),
        "model": model,
        "notes": {"fitted on": "2 scenes"},
    }
    return Plan(timelines=lines or (line(),), **known | more)


def test_a_saved_plan_is_the_plan(tmp_path: Path) -> None:
    ours = plan(line(), line(6), line(6, phase=1), lanes=2, batch=2)
    ours.save(tmp_path / "plan.safetensors")
    back = Plan.load(tmp_path / "plan.safetensors")
    for name in ("policy", "options", "outputs", "model", "lanes", "batch", "notes"):
        assert getattr(back, name) == getattr(ours, name)
    assert back.model is not None
    assert not back.model.differences(plan().model or Fingerprint())
    for a, b in zip(ours.timelines, back.timelines, strict=True):
        assert (a.schedule, a.timesteps, a.error, a.speed, a.phase) == (
            b.schedule,
            b.timesteps,
            b.error,
            b.speed,
            b.phase,
        )
        assert torch.equal(a.coefficients["out0"], b.coefficients["out0"])
    assert str(back) == str(ours)


def test_print_shows_what_it_does() -> None:
    text = str(plan())
    for part in (
        "'forecast'",
        "Model, 3 layers of width 8",
        "the latent in hidden_states, from channel 2",
        "██·█",
        "rgb 0.0125",
        "2.50",
    ):
        assert part in text


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        Plan.load(path)
    path.write_text("not one")
    with pytest.raises(ValueError, match="no safetensors file"):
        Plan.load(path)
    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="holds no plan"):
        Plan.load(path)
    save_file({"a": torch.zeros(1)}, str(path), metadata={"format": "hero_fx.plan", "version": "99", "plan": "{}"})
    with pytest.raises(ValueError, match="version 99"):
        Plan.load(path)
    save_file(
        {"a": torch.zeros(1)}, str(path), metadata={"format": "hero_fx.plan", "version": "1", "plan": json.dumps({})}
    )
    with pytest.raises(ValueError, match="damaged"):
        Plan.load(path)
    with pytest.raises(ValueError, match=r"neither a hero_fx.Plan nor the path"):
        hero_fx.backend(plan=3)  # type: ignore[arg-type]


BAD: list[tuple[Any, str]] = [
    (lambda: line(schedule=(False, True, True, True)), "first step must be full"),
    (lambda: line(timesteps=(1.0, 2.0)), "2 values for 4 steps"),
    (lambda: line(coefficients={"out0": torch.zeros(3, 5, 1)}), r"\[4 steps, terms, ...\]"),
    (lambda: line(coefficients={"out0": torch.full((4, 5, 1), float("nan"))}), "not finite"),
    (lambda: plan(policy="fora"), "policy='fora' of a plan"),
    (lambda: plan(outputs=()), "needs rules for outputs"),
    (lambda: plan(line(), line()), "same timesteps"),
    (lambda: plan(line(), line(phase=2)), r"have the phases \[0, 2\]: number them from 0"),
    (lambda: line(phase=-1), "phase=-1"),
    (lambda: plan(line(), line(6, coefficients={"out0": torch.zeros(6, 5, 2)})), "shapes .* must agree"),
    (lambda: plan(line(coefficients={"out1": torch.zeros(4, 5, 1)})), "lack 'out0'"),
    (lambda: Plan(policy="hero", timelines=()), "is empty"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_plans_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plan_decides_and_what_is_given_beside_it_must_agree() -> None:
    config = hero_fx.backend(plan=plan()).config
    assert (config.policy, config.schedule, config.num_steps) == ("forecast", MASK, 4)
    hero_fx.backend("forecast", plan=plan(), num_steps=4, schedule=[1, 1, 0, 1])
    for options, message in (
        ({"policy": "fora"}, "policy='fora': the plan was calibrated for 'forecast'"),
        ({"num_steps": 5}, "num_steps=5: the plan is for 4 steps"),
        ({"schedule": [1, 1, 1, 1]}, "schedule="),
        ({"interval": 3}, "interval=3"),
        ({"refresh_ratio": 0.25}, "refresh_ratio=0.25 has no effect"),
        ({"state_dtype": torch.int8}, "state_dtype=torch.int8"),
        ({"plan_mismatch": "ignore"}, "plan_mismatch='ignore'"),
    ):
        with pytest.raises(ValueError, match=message):
            hero_fx.backend(plan=plan(), **options)


def test_options_of_a_plan_are_taken_over() -> None:
    table = torch.ones(4, 2, 3)
    hero = plan(
        line(coefficients={"x": table}), policy="hero", outputs=(), options={"refresh_layers": 2, "keys": "sampled"}
    )
    config = hero_fx.backend(plan=hero).config
    assert (config.policy, config.refresh_layers, config.keys) == ("hero", 2, "sampled")
    with pytest.raises(ValueError, match="keys='all': the plan was calibrated for 'sampled'"):
        hero_fx.backend(plan=hero, keys="all")


def test_one_of_several_timelines() -> None:
    several = plan(line()).with_timelines(plan(line(6)))
    assert hero_fx.backend(plan=several, num_steps=6).config.num_steps == 6
    config = hero_fx.backend(plan=several).config
    assert (config.num_steps, config.timelines) == (None, several.timelines)
    assert config.schedule_of(6) is several.timelines[1]
    for options, message in (
        ({"num_steps": 5}, "num_steps=5: the plan is for 4, 6 steps"),
        ({"schedule": "toca"}, "schedule='toca': the plan has a schedule for each of its 2 timelines"),
    ):
        with pytest.raises(ValueError, match=message):
            hero_fx.backend(plan=several, **options)
    with pytest.raises(ValueError, match="timelines of 4, 6 steps; say which with num_steps="):
        config.make_schedule()
    with pytest.raises(ValueError, match="differ in lanes, so they stay two plans"):
        plan().with_timelines(plan(line(6), lanes=2))


def test_timelines_by_phase() -> None:
    first, later = line(), line(phase=1, coefficients={"out0": torch.zeros(4, 5, 1, 3)})
    phased = plan(first, later, line(6))
    assert phased.phases == 2
    assert [phased.timeline(4, phase) for phase in (0, 1, 7)] == [first, later, later]
    assert phased.fitting(6, 3) == (phased.timelines[2],)
    assert "phase" in str(phased)
    assert "phase" not in str(plan())


def test_by_name_and_from_a_file(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.safetensors")
    config = hero_fx.Config.from_options({"plan": str(tmp_path / "plan.safetensors")})
    assert config.policy == "forecast"
    assert config.num_steps == 4
