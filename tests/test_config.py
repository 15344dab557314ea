"""Every option of `hero_fx.backend` refuses bad values: the error names the option, its value and the fix."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

import hero_fx
from hero_fx.config import Config
from hero_fx.policy import Fora

BAD: list[tuple[dict[str, Any], str]] = [
    ({"plan": 3}, "neither a hero_fx.Plan nor the path of one"),
    ({"plan": "nowhere.safetensors"}, "there is no such file"),
    ({"plan_mismatch": "ignore"}, "'error', 'warn'"),
    ({"policy": "forecast"}, "needs a plan"),
    ({"policy": "heroic"}, "is not one of 'hero', .*'full' or a policy object"),
    ({"policy": 3}, "neither a name .* nor an object with name, steps and kind"),
    ({"policy": Fora}, "neither a name .* nor an object with name, steps and kind"),
    ({"interval": 0}, "at least 1"),
    ({"interval": -2}, "at least 1"),
    ({"interval": 2.0}, "whole number"),
    ({"interval": True}, "whole number"),
    ({"schedule": "unifrom"}, '"uniform", "toca".*or a sequence'),
    ({"schedule": "toca"}, "needs num_steps"),
    ({"schedule": 3}, "one truth value a step"),
    ({"schedule": []}, "one truth value for each step"),
    ({"schedule": [0, 1]}, "Make the first value true"),
    ({"schedule": [1, 2, 3]}, "truth value"),
    ({"schedule": [1, 0], "num_steps": 3}, "Make them agree"),
    ({"num_steps": 0}, "at least 1"),
    ({"num_steps": 5.5}, "whole number"),
    ({"warmup": 0}, "at least 1"),
    ({"warmup": "3"}, "whole number"),
    ({"cooldown": -1}, "at least 0"),
    ({"cooldown": 2}, "Pass num_steps="),
    ({"refresh_layers": -1}, "count from 0 to the depth, or a float from 0.0 to 1.0"),
    ({"refresh_layers": 1.5}, "float from 0.0 to 1.0"),
    ({"refresh_layers": float("nan")}, "float from 0.0 to 1.0"),
    ({"refresh_layers": "half"}, "count from 0"),
    ({"refresh_layers": True}, "count from 0"),
    ({"refresh_ratio": 0}, "above 0 and at most 1, such as 1/6"),
    ({"refresh_ratio": 1.1}, "above 0 and at most 1"),
    ({"refresh_ratio": float("nan")}, "above 0 and at most 1"),
    ({"refresh_ratio": "1/6"}, "above 0 and at most 1"),
    ({"refresh_ratio": True}, "above 0 and at most 1"),
    ({"patch": (2, 3)}, r"three whole numbers \(frames, height, width\)"),
    ({"patch": (0, 2, 3)}, "of at least 1"),
    ({"patch": 6}, "three whole numbers"),
    ({"order": -1}, "at least 0"),
    ({"order": 1.0}, "whole number"),
    ({"selection": "per_block"}, "'per_step', 'per_layer'"),
    ({"keys": "text"}, "'sampled', 'sampled\\+text', 'landmarks', 'all'"),
    ({"text": "dead"}, "'skip', 'live'"),
    ({"cache_point": "gate"}, "'pre_gate', 'post_gate' or a pair"),
    ({"cache_point": ("pre_gate",)}, "a pair for \\(shallow, deep\\)"),
    ({"cache_point": ("pre_gate", None)}, "'pre_gate', 'post_gate' or a pair"),
    ({"cache_point": ("pre_gate",) * 3}, "a pair for \\(shallow, deep\\)"),
    ({"cache_point": ("pre_gate", "post_gate"), "policy": "fora"}, "give one value"),
    ({"unsampled": "forget"}, "'reuse', 'extrapolate', 'gate'"),
    ({"cache_point": "pre_gate", "unsampled": "gate"}, "leave cache_point out, or give 'post_gate'"),
    ({"age_weighting": "yes"}, "True, False"),
    ({"state_dtype": "bfloat16"}, "floating-point torch.dtype, torch.int8 or None"),
    ({"state_dtype": torch.int16}, "floating-point torch.dtype, torch.int8 or None"),
    ({"form": "folded"}, "is not one of .*'literal'"),
    ({"grid": (2, 3)}, r"three whole numbers \(frames, height, width\)"),
    ({"grid": (2, 3, 4.0)}, "three whole numbers"),
    ({"timestep": -1}, "give the argument's name"),
    ({"timestep": True}, "give the argument's name"),
    ({"timestep": 1.5}, "give the argument's name"),
    ({"seed": "seed"}, "whole number"),
    ({"inner": "inducer"}, "'inductor', 'aot_eager', 'eager' or a backend callable"),
    ({"inner": 5}, "or a backend callable"),
    ({"mode": "max-autotune", "inner": "eager"}, "with inner='eager' leave them out"),
    ({"options": {"max_autotune": True}, "inner": "aot_eager"}, "with inner='aot_eager' leave them out"),
    ({"disable_passes": ("refresh",)}, "names of passes that preserve numerics: .*sink_scatters"),
    ({"max_state_bytes": 0}, "whole number of at least 1"),
    ({"disable_passes": "write_rows"}, "names of passes that preserve numerics"),
    ({"strict": "no"}, "True, False"),
]


@pytest.mark.parametrize(("options", "fix"), BAD, ids=lambda value: repr(value) if isinstance(value, dict) else "")
def test_bad_values(options: dict[str, Any], fix: str) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=fix) as error:
        hero_fx.backend(**options)
    assert name in str(error.value)
    if not isinstance(value, (list, tuple)):
        assert str(value) in str(error.value)


def test_every_option_has_a_bad_value() -> None:
    assert {next(iter(options)) for options, _ in BAD} == {field.name for field in dataclasses.fields(Config)}


HEROES = {"hero", "lean"}
IDLE: dict[str, tuple[Any, set[str]]] = {
    "refresh_layers": (2, HEROES),
    "refresh_ratio": (0.5, HEROES | {"toca", "duca"}),
    "patch": ((1, 1, 2), HEROES),
    "order": (2, HEROES | {"taylorseer"}),
    "selection": ("per_layer", {"hero"}),
    "keys": ("sampled", {"hero"}),
    "text": ("live", HEROES | {"toca", "duca"}),
    "cache_point": ("post_gate", {"hero", "fora", "taylorseer", "toca", "duca"}),
    "unsampled": ("extrapolate", HEROES),
    "age_weighting": (False, HEROES),
    "seed": (1, HEROES),
    "grid": ((2, 3, 4), HEROES | {"toca", "duca"}),
}


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("policy", ["hero", "lean", "fora", "taylorseer", "toca", "duca", "full"])
def test_options_without_effect(name: str, policy: str) -> None:
    value, users = IDLE[name]
    if policy in users:
        hero_fx.backend(policy, **{name: value})
        return
    with pytest.raises(ValueError, match=f"^{name}=.* has no effect with policy='{policy}'; .*: leave it out$"):
        hero_fx.backend(policy, **{name: value})


@pytest.mark.parametrize("name", ["warmup", "cooldown"])
def test_uniform_options_with_other_schedules(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=2 has no effect with schedule='toca'; .*: leave it out$"):
        Config.from_options({"schedule": "toca", "num_steps": 9, name: 2})


def test_interval_with_an_explicit_schedule() -> None:
    steps = (True, False, True)
    with pytest.raises(
        ValueError, match=r"^interval=3 has no effect with a schedule that is given step by step; leave"
    ):
        hero_fx.backend(interval=3, schedule=steps)
    hero_fx.backend("duca", interval=3, schedule=steps)  # an age of N steps counts in its scores


def test_unknown_options() -> None:
    with pytest.raises(TypeError, match="intervall"):
        hero_fx.backend(intervall=2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"unknown options 'a', 'b' for backend 'hero_fx'; allowed are policy, "):
        Config.from_options({"a": 1, "interval": 2, "b": 3})


def test_the_function_and_the_configuration_agree() -> None:
    parameters = inspect.signature(hero_fx.backend).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        field.name: field.default for field in dataclasses.fields(Config)
    }
