"""Joint attention of text and image tokens among ranks: a small Flux, of whose text each rank has a part too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import hero_fx

from .tiny import randomized
from .tracing import Variants

STEPS = 5
FULL = (0, 3)
SCHEDULE: dict[str, Any] = {"interval": 3, "warmup": 1, "cooldown": 0, "inner": "eager"}
POLICIES: dict[str, dict[str, Any]] = {
    "hero": {**SCHEDULE, "grid": (1, 4, 6)},
    "live text": {**SCHEDULE, "text": "live", "keys": "sampled", "grid": (1, 4, 6)},
    "no refresh": {**SCHEDULE, "refresh_layers": 0},
}


@dataclass
class Run:
    """A trajectory."""

    outputs: list[Tensor] = field(default_factory=list)
    full: list[bool] = field(default_factory=list)
    selections: list[Tensor] = field(default_factory=list)
    """Sampled tokens of each cached step."""
    exchanges: tuple[int, int] = (0, 0)
    """all_to_all in the full and in the cached step graph."""


def flux() -> Any:
    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return randomized(model)


def inputs() -> dict[str, Any]:
    """24 image and 6 text tokens."""
    generator = torch.Generator().manual_seed(3)
    places = torch.zeros(24, 3)
    places[:, 1], places[:, 2] = torch.arange(24) // 6, torch.arange(24) % 6
    return {
        "hidden_states": torch.randn(2, 24, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 6, 20, generator=generator),
        "pooled_projections": torch.randn(2, 12, generator=generator),
        "img_ids": places,
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
    }


def run_all(model: Any, given: Mapping[str, Any] | None = None) -> dict[str, Run]:
    """A trajectory of each policy; Dynamo traces the model once. `given`: by policy, what stands in for its selections."""
    torch._dynamo.reset()
    variants = Variants(**{name: hero_fx.backend(**options) for name, options in POLICIES.items()})
    call: Any = torch.compile(model, backend=variants, fullgraph=True)
    return {name: _run(call, variants, name, (given or {}).get(name)) for name in POLICIES}


def _run(call: Any, variants: Variants, name: str, given: Any) -> Run:
    variants.now, run, values = name, Run(), inputs()
    for step in range(STEPS):
        with torch.no_grad(), hero_fx.calling(lane="only", step_index=step):
            output = call(**values, timestep=torch.full((2,), 1 - step / STEPS))[0]
        run.outputs.append(output.clone())
        values["hidden_states"] = values["hidden_states"] - output / STEPS
        (stepper,) = variants.backends[name].steppers
        assert stepper.last is not None
        run.full.append(stepper.last.full)
        if stepper.selections is None:
            continue
        if given is not None:
            stepper.selections = given
        elif not stepper.last.full:
            run.selections.append(stepper.selections.at(tuple(run.full))[0])
    (graphs,) = variants.backends[name].graphs
    full, cached = (
        hero_fx.op_count(gm)["_c10d_functional.all_to_all_single"] for gm in (graphs.full, graphs.cached[0])
    )
    run.exchanges = full, cached
    return run
