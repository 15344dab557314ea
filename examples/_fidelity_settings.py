"""What the fidelity bench compares: methods at equal numbers of full steps, ablations, and the open choices of HERO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["APART", "HERO", "METHODS", "PLAN", "Setting", "alphas", "boundaries", "choices", "full", "methods"]


@dataclass(frozen=True)
class Setting:
    """One way to sample."""

    name: str
    options: dict[str, Any] | None = field(default=None, hash=False)
    """Options of `hero_fx.backend`; None: the model as it is."""
    steps: int | None = None
    """Steps of a trajectory, if not the task's own."""
    solver: str | None = None
    """Another solver of diffusers, of `_fidelity_rivals.SOLVERS`."""
    plan: int | None = None
    """Full steps of a calibrated plan that is followed."""
    apart: bool = False
    """Of that plan: the halves of guidance have full steps of their own, as many together."""
    cache_dit: tuple[bool, ...] | None = None
    """Full steps of cache-dit, which then caches in our place."""

    @property
    def key(self) -> str:
        """What it does, as text; equal for settings that differ in name alone."""
        more = [value for value in (self.solver, self.plan, self.cache_dit, self.apart or None) if value is not None]
        return json.dumps([self.options, self.steps, *more], sort_keys=True, default=str)

    @property
    def interval(self) -> int | None:
        """N, if it caches."""
        return None if self.options is None else int(self.options.get("interval", 2))


HERO = "HERO"
PLAN, APART = "plan", "plan by halves"
METHODS: dict[str, dict[str, Any]] = {
    "FORA": {"policy": "fora"},
    "TaylorSeer 1": {"policy": "taylorseer"},
    "TaylorSeer 2": {"policy": "taylorseer", "order": 2},
    "ToCa": {"policy": "toca"},
    "DuCa": {"policy": "duca"},
    HERO: {},
    "HERO reuse": {"unsampled": "reuse"},
    "HERO lean": {"policy": "lean"},
}
"""Options of `hero_fx.backend` by name; "HERO reuse" is the paper's, where tokens that are not sampled reuse their features."""


def full() -> Setting:
    """Every step computed in full."""
    return Setting("full compute")


def methods(interval: int) -> list[Setting]:
    """All methods with a full step every `interval` steps, after the same first three and before the same last one."""
    return [Setting(f"{name}, N={interval}", {**options, "interval": interval}) for name, options in METHODS.items()]


def alphas(depth: int) -> list[Setting]:
    """The paper's Table 3: the share of refreshed tokens at M = 16 of 42 layers, N = 2."""
    layers = round(16 / 42 * depth)
    return [
        Setting(f"α = {k}/6", {"interval": 2, "refresh_layers": layers, "refresh_ratio": k / 6})
        for k in (5, 4, 3, 2, 1)
    ]


def boundaries(depth: int) -> list[Setting]:
    """The paper's Table 4: M = 6 .. 36 of 42 layers in steps of 5, scaled to the depth, and none and all, at N = 2."""
    counts = sorted({0, *(round(m / 42 * depth) for m in (6, 11, 16, 21, 26, 31, 36)), depth})
    return [Setting(f"M = {m} of {depth}", {"interval": 2, "refresh_layers": m}) for m in counts]


CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {"(default)": {}},
    "tokens not sampled": {
        "reuse (the paper)": {"unsampled": "reuse"},
        "reuse, post and post": {"unsampled": "reuse", "cache_point": "post_gate"},
        "gate": {"unsampled": "gate"},
        "gate, landmarks": {"unsampled": "gate", "keys": "landmarks"},
    },
    "cache points": {
        "pre and post": {"cache_point": ("pre_gate", "post_gate")},
        "pre and pre": {"cache_point": "pre_gate"},
        "post and pre": {"cache_point": ("post_gate", "pre_gate")},
    },
    "selection": {"per layer": {"selection": "per_layer"}},
    "keys and values": {
        "sampled": {"keys": "sampled"},
        "sampled and text": {"keys": "sampled+text"},
        "landmarks": {"keys": "landmarks"},
    },
    "text": {"live": {"text": "live"}},
    "schedule": {"toca": {"schedule": "toca"}},
    "patch": {
        "6 x 1 x 1": {"patch": (6, 1, 1)},
        "1 x 4 x 4": {"patch": (1, 4, 4)},
        "whole clip": {"patch": (6, 8, 8)},
    },
    "age weighting": {"off": {"age_weighting": False}},
    "order": {"0": {"order": 0}, "2": {"order": 2}},
    "M": {
        "0": {"refresh_layers": 0.0},
        "a quarter": {"refresh_layers": 0.25},
        "three quarters": {"refresh_layers": 0.75},
        "all": {"refresh_layers": 1.0},
    },
    "α": {"1/12": {"refresh_ratio": 1 / 12}, "1/3": {"refresh_ratio": 1 / 3}, "1/2": {"refresh_ratio": 1 / 2}},
    "dtype of the state": {
        "bfloat16": {"state_dtype": torch.bfloat16},
        "float8_e4m3fn": {"state_dtype": torch.float8_e4m3fn},
        "int8, scaled by token": {"state_dtype": torch.int8},
    },
    "preset": {
        "lean": {"policy": "lean"},
        "TaylorSeer 1": {"policy": "taylorseer"},
    },
}
"""By choice and value: options of `hero_fx.backend` that differ from the defaults."""


def choices(interval: int, only: Sequence[str] | None = None) -> list[tuple[str, Setting]]:
    """(choice, setting) of HERO's open choices, one changed at a time."""
    return [
        (choice, Setting(value, {**options, "interval": interval}))
        for choice, values in CHOICES.items()
        if only is None or choice in only or choice == "default"
        for value, options in values.items()
    ]
