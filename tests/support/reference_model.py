"""A tiny CogVideoX for the eager reference, and steps of both."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from ..reference import Reference

BATCH, TEXT, LAYERS, GRID = 2, 7, 3, (3, 3, 5)
IMAGE = 3 * 3 * 5


@cache
def model_of(rotary: bool) -> Any:
    """A tiny CogVideoX; constant parameters (norms, biases) are randomised so that a missing one shows."""
    torch.manual_seed(0)
    model: Any = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=20,
        text_embed_dim=24,
        num_layers=LAYERS,
        sample_width=10,
        sample_height=6,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
    )
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def inputs(rotary: bool, seed: int) -> dict[str, Any]:
    """Arguments of one step: other latents and another timestep for every seed."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.Generator().manual_seed(100)
    angle = torch.randn(IMAGE, 8, generator=tables).repeat_interleave(2, dim=1)
    return {
        "hidden_states": torch.randn(BATCH, 3, 4, 6, 10, generator=generator),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 24, generator=generator),
        "timestep": torch.tensor([900 - 50 * seed] * BATCH),
        "image_rotary_emb": (angle.cos(), angle.sin()) if rotary else None,
    }


def full(reference: Reference, kwargs: dict[str, Any], d: int = 0, fulls: int = 0) -> Tensor:
    return reference.run(kind="full", x=0, d=d, fulls=fulls, indices=None, **kwargs)


def cached(reference: Reference, kwargs: dict[str, Any], x: int, idx: Tensor | None = None) -> Tensor:
    indices = None if idx is None else lambda layer: idx
    return reference.run(kind="cached", x=x, d=0, fulls=1, indices=indices, **kwargs)


def sample(count: int, seed: int = 5) -> Tensor:
    return torch.randperm(IMAGE, generator=torch.Generator().manual_seed(seed))[:count]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
