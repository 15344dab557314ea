"""Plans for policy "forecast", and the trajectories that the eager reference gives by them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Plan, Timeline

from ..reference_forecast import forecast_trajectory
from . import tiny

STEPS = 10
MASK = tuple(map(bool, (1, 1, 1, 0, 0, 1, 0, 1, 0, 0)))


class Conditioned(nn.Module):
    """A convolution on a latent with conditioning channels behind it: no residual branch, no attention."""

    def __init__(self, extra: int = 0, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(3 + extra, 3, 3, padding=1) for _ in range(outputs))
        self.time = nn.Linear(1, 3)

    def forward(self, sample: Tensor, timestep: Tensor, audio: Tensor | None = None) -> Any:
        time = self.time(timestep.float()[:, None] / 1000)[:, :, None, None]
        result = [torch.tanh(conv(sample) + time) for conv in self.convs]
        if audio is not None:
            return result[0], torch.sin(audio * 2 + time.mean())
        return result[0] if len(result) == 1 else tuple(result)


def theta(*shape: int, steps: int = STEPS, terms: int = 5, seed: int = 7) -> Tensor:
    return 0.3 * torch.randn(steps, terms, *shape, generator=torch.Generator().manual_seed(seed))


def times(steps: int = STEPS) -> tuple[float, ...]:
    return tuple(float(t) for t in tiny.timesteps(steps))


def fitting(**changes: Any) -> hero_fx.Fingerprint:
    """The fingerprint of `tiny.cogvideox(layers=2)`."""
    model = tiny.cogvideox(layers=2)
    config = {name: value for name, value in json.loads(model.to_json_string()).items() if not name.startswith("_")}
    usual = {"name": "CogVideoXTransformer3DModel", "config": config, "depth": 2, "width": 32, "outputs": ((4,),)}
    return hero_fx.Fingerprint(**{**usual, **changes})


FITTING = fitting()
CAPTURED: dict[str, Any] = {"name": "", "config": {}}
"""What differs where the graph of `tiny.captured` is all there is of the model."""


def plan_of(
    rule: OutputRule, table: Tensor, model: Any = None, *, mask: tuple[bool, ...] = MASK, name: str = "", **more: Any
) -> Plan:
    line = Timeline(schedule=mask, timesteps=times(len(mask)), coefficients={rule.table: table})
    model = model or hero_fx.Fingerprint(name=name, outputs=more.pop("outputs", ()))
    return Plan(policy="forecast", timelines=(line,), outputs=(rule,), model=model, **more)


def by_reference(
    model: Any, kwargs: dict[str, Any], table: Tensor, latent: slice | None, history: int, mask: tuple[bool, ...] = MASK
) -> list[Tensor]:
    """The closed loop of `tiny.denoise`."""
    sample, steps, result = kwargs["hidden_states"], len(mask), []

    def call(step: int) -> Tensor:
        time = tiny.timesteps(steps)[step].expand(sample.shape[0])
        out: Tensor = model(**{**kwargs, "hidden_states": sample}, timestep=time, return_dict=False)[0]
        return out

    with torch.no_grad():
        of = None if latent is None else lambda step: sample[:, :, latent]
        for out in forecast_trajectory(call, table, mask, of, history):
            result.append(out)
            sample = sample - out / steps
    return result
