"""What the pipelines of `diffusion_pipelines` are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from .examples import example
from .tiny import randomized

zoo = example("_zoo")

STEPS = 8
TEXT = 7
"""Tokens of the prompt."""


@dataclass
class Case:
    """A pipeline and one call of it."""

    pipe: Any
    call: dict[str, Any]
    lanes: int = 1
    """Calls of the transformer per step."""
    graphs: int = 1
    """How many shapes these calls have: each compiles once."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the backend that the graph does not show."""
    decoded: tuple[int, ...] = ()
    """Shape of the decoded result."""

    def run(self, seed: int = 5, **more: Any) -> Any:
        """The pipeline's output."""
        generator = torch.Generator().manual_seed(seed)
        settings = {"generator": generator, "num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        return self.pipe(**{**self.call, **settings, **more})[0]


Builder = Callable[[], Case]
PIPELINES: dict[str, Builder] = {}


def entry(build: Builder) -> Builder:
    PIPELINES[build.__name__] = build
    return build


def latents_of(case: Case, **more: Any) -> list[Tensor]:
    """The latents after every step of a run."""
    seen: list[Tensor] = []

    def keep(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    case.run(callback_on_step_end=keep, **more)
    return seen


def pipeline_of(kind: str, **parts: Any) -> Any:
    """A pipeline without text encoders, silent, its autoencoder in eval mode."""
    pipe = getattr(diffusers, kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.eval().requires_grad_(False)
    return pipe


def transformer_of(name: str, **options: Any) -> Any:
    """The transformer of that name of the zoo with two layers, or with other options."""
    model = zoo.sample(name).model
    layers = {"num_layers": 1, "num_single_layers": 1} if "num_single_layers" in model.config else {"num_layers": 2}
    torch.manual_seed(0)
    return randomized(type(model).from_config({**model.config, **layers, **options}))


def embeds(width: int, *, text: int = TEXT, negative: int = TEXT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        "prompt_embeds": torch.randn(1, text, width, generator=generator),
        "negative_prompt_embeds": torch.randn(1, negative, width, generator=generator),
    }


def pooled(width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(12)
    return {
        "pooled_prompt_embeds": torch.randn(1, width, generator=generator),
        "negative_pooled_prompt_embeds": torch.randn(1, width, generator=generator),
    }


def image(height: int, width: int) -> Tensor:
    """[1, 3, height, width] in 0..1."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(13))


def video(frames: int = 9, height: int = 32, width: int = 48) -> dict[str, int]:
    return {"num_frames": frames, "height": height, "width": width}


def nothing(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)
