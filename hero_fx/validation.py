"""Whether options make sense, alone and together."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, get_args

import torch

from hero_fx.passes.rewrite.plan import CachePoint, Keys, Text, Unsampled

from .arguments import is_number, one_of, triple, whole_number
from .policy import Policy
from .stages import OPTIONAL

if TYPE_CHECKING:
    from .config import Config

__all__ = ["check_options"]

_POLICIES = ("hero", "lean", "fora", "taylorseer", "toca", "duca", "forecast", "full")
_INNER = ("inductor", "aot_eager", "eager")
_OBJECT = "a policy object"
_SAMPLED = ("hero", "lean", _OBJECT)
# Which policies an option means something to; options that are not named here mean something to all.
_USED_BY = {
    "refresh_layers": ("hero", "lean"),
    "refresh_ratio": (*_SAMPLED, "toca", "duca"),
    "patch": _SAMPLED,
    "order": ("hero", "lean", "taylorseer"),
    "selection": ("hero",),
    "keys": ("hero",),
    "text": ("hero", "lean", "toca", "duca"),
    "cache_point": ("hero", "fora", "taylorseer", "toca", "duca"),
    "unsampled": ("hero", "lean"),
    "age_weighting": _SAMPLED,
    "seed": _SAMPLED,
    "grid": (*_SAMPLED, "toca", "duca"),
}


def check_options(config: Config) -> None:
    """Raises ValueError for an option that is out of range, or has no effect with the others."""
    for check in (_check_policy, _check_schedule, _check_tokens, _check_caches, _check_compiling):
        check(config)


def _check_policy(config: Config) -> None:
    one_of("plan_mismatch", config.plan_mismatch, ("error", "warn"))
    if isinstance(config.policy, str):
        one_of("policy", config.policy, _POLICIES, "or a policy object")
        _no_idle_options(config, config.policy)
    elif isinstance(config.policy, type) or not isinstance(config.policy, Policy):
        raise ValueError(
            f"policy={config.policy!r} is neither a name ({', '.join(_POLICIES)}) nor an object with name, steps and kind"
        )
    else:
        _no_idle_options(config, _OBJECT)


def _check_schedule(config: Config) -> None:
    whole_number("interval", config.interval, 1)
    whole_number("warmup", config.warmup, 1)
    whole_number("cooldown", config.cooldown, 0)
    if config.num_steps is not None:
        whole_number("num_steps", config.num_steps, 1)
    for name, default in (("warmup", 3), ("cooldown", 1)):
        if config.schedule != "uniform" and getattr(config, name) != default:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no effect with schedule={config.schedule!r}; it is for 'uniform': "
                "leave it out"
            )
    if not isinstance(config.schedule, str) and config.interval != 2 and config.policy not in ("toca", "duca"):
        raise ValueError(
            f"interval={config.interval!r} has no effect with a schedule that is given step by step; leave it out"
        )


def _check_tokens(config: Config) -> None:
    whole_number("order", config.order, 0)
    most = 1.0 if isinstance(config.refresh_layers, float) else math.inf
    if not is_number(config.refresh_layers) or not 0 <= config.refresh_layers <= most:
        raise ValueError(
            f"refresh_layers={config.refresh_layers!r} must be a count from 0 to the depth, or a float from 0.0 to 1.0 "
            "as share of the depth"
        )
    if not is_number(config.refresh_ratio) or not 0 < config.refresh_ratio <= 1:
        raise ValueError(f"refresh_ratio={config.refresh_ratio!r} must be above 0 and at most 1, such as 1/6")
    triple("patch", config.patch)
    if config.grid is not None:
        triple("grid", config.grid)
    one_of("selection", config.selection, ("per_step", "per_layer"))
    if config.keys is not None:
        one_of("keys", config.keys, get_args(Keys))
    one_of("text", config.text, get_args(Text))
    if config.unsampled is not None:
        one_of("unsampled", config.unsampled, get_args(Unsampled))
    one_of("form", config.form, ("collapsed", "literal"))
    whole_number("seed", config.seed, None)
    one_of("age_weighting", config.age_weighting, (True, False))


def _check_caches(config: Config) -> None:
    points = config.cache_point if isinstance(config.cache_point, tuple) else (config.cache_point,)
    if isinstance(config.cache_point, tuple) and len(points) != 2:
        raise ValueError(f"cache_point={config.cache_point!r} must be one value or a pair for (shallow, deep) layers")
    for point in points:
        if point is not None or isinstance(config.cache_point, tuple):
            one_of("cache_point", point, get_args(CachePoint), "or a pair of them for (shallow, deep)")
    if isinstance(config.cache_point, tuple) and config.policy != "hero":
        raise ValueError(
            f"cache_point={config.cache_point!r}: only policy='hero' has shallow and deep layers; give one value"
        )
    if config.unsampled == "gate" and points[0] == "pre_gate":
        raise ValueError(
            f"cache_point={config.cache_point!r}: unsampled='gate' is for shallow caches behind the gate, in front of it the "
            "live gate is applied anyway; leave cache_point out, or give 'post_gate'"
        )
    dtype = config.state_dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype is torch.int8)):
        raise ValueError(f"state_dtype={dtype!r} must be a floating-point torch.dtype, torch.int8 or None")
    if config.max_state_bytes is not None:
        whole_number("max_state_bytes", config.max_state_bytes, 1)
    if dtype is torch.int8 and config.policy == "forecast":
        raise ValueError(f"state_dtype={dtype!r}: outputs have no tokens to scale by; give a floating-point dtype")


def _check_compiling(config: Config) -> None:
    if config.timestep is not None and not isinstance(config.timestep, str):
        whole_number(
            "timestep", config.timestep, 0, "as a position among the graph's inputs; or give the argument's name"
        )
    unknown = [name for name in config.disable_passes if name not in OPTIONAL]
    if unknown or isinstance(config.disable_passes, str):
        raise ValueError(
            f"disable_passes={config.disable_passes!r} must be names of passes that preserve numerics: "
            f"{', '.join(sorted(OPTIONAL))}"
        )
    one_of("strict", config.strict, (True, False))
    if not callable(config.inner):
        one_of("inner", config.inner, _INNER, "or a backend callable")
    if config.inner != "inductor" and (config.mode or config.options):
        raise ValueError(
            f"mode={config.mode!r} and options={config.options!r} are Inductor's; with inner={config.inner!r} leave them out"
        )


def _no_idle_options(config: Config, policy: str) -> None:
    """An option that the policy does not look at must not be set: it would be ignored in silence."""
    defaults = {f.name: f.default for f in fields(config)}
    for name, users in _USED_BY.items():
        value = getattr(config, name)
        if policy not in users and value != defaults[name]:
            raise ValueError(
                f"{name}={value!r} has no effect with policy={policy!r}; it is for "
                f"{', '.join(map(repr, users))}: leave it out"
            )
