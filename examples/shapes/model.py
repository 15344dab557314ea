"""The transformer, diffusers' Wan at a small size, and its scheduler."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from .autoencoder import CHANNELS
from .clips import TEXT

__all__ = ["SHIFT", "shapes_scheduler", "shapes_transformer"]

SHIFT = 3.0
"""Noise level σ of the share u of a trajectory that is left: σ = SHIFT u / (1 + (SHIFT - 1) u), as Wan 2.1 has it at 480p."""
GATE = 0.3
"""Gates of an untrained model."""


def shapes_transformer(layers: int = 6, heads: int = 4, head: int = 32) -> Any:
    """A Wan transformer for latents of 16 channels at 4 x 8 x 8: 4 x 4 x 4 tokens, and 3 of text.

    At first every gate is `GATE` and nothing else depends on the timestep, and the output is 0.
    """
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=64,
        ffn_dim=4 * heads * head,
        num_layers=layers,
    )
    torch.nn.init.zeros_(model.condition_embedder.time_proj.weight)
    torch.nn.init.zeros_(model.condition_embedder.time_proj.bias)
    for block in model.blocks:
        torch.nn.init.zeros_(block.scale_shift_table)
        block.scale_shift_table.data[:, [2, 5]] = GATE  # shift, scale, gate of attention, then of the feed-forward
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def shapes_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler's method along straight lines from noise to clips."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)
