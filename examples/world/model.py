"""The transformer: diffusers' CogVideoX at a small size, its scheduler, and the inputs that every call needs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from .latents import CONDITION, FOLD, LATENT
from .settings import TASKS

FRAMES, SIZE = 6, 32
TOKENS = 4
"""Text tokens of a task."""
TEXT = (len(TASKS) + 1) * TOKENS
"""Width of a text token: one number for each token of each task, and of no task."""

GATE = 0.3
"""Gates of an untrained model."""


def world_transformer(layers: int = 16, heads: int = 4, head: int = 32, time_width: int = 64) -> Any:
    """A CogVideoX transformer for clips of 6 frames of 32 x 32 pixels: 6 x 8 x 8 image tokens and 4 of text.

    At first every gate is `GATE` and nothing else depends on the timestep, and the output is 0.
    """
    model = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=LATENT + CONDITION,
        out_channels=LATENT,
        time_embed_dim=time_width,
        text_embed_dim=TEXT,
        num_layers=layers,
        sample_frames=4 * (FRAMES - 1) + 1,
        sample_height=SIZE // FOLD,
        sample_width=SIZE // FOLD,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
            for gate in (2, 5):  # shift, scale, gate of the image, then of the text
                norm.linear.bias.data.chunk(6)[gate].fill_(GATE)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def world_scheduler() -> CogVideoXDDIMScheduler:
    """DDIM as CogVideoX uses it: v-prediction, trailing timesteps, no signal left at the first one.

    The signal-to-noise ratio is a third of the usual, for a camera is told by many pixels and is soon to be seen in noise.
    """
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
    )


def task_text(tasks: list[str | None]) -> Tensor:
    """Text tokens [B, 4, 12] that name the tasks; `None` is no task. They are one-hot: the model's own projection of the
    text turns them into learned embeddings."""
    first = torch.tensor([TOKENS * (0 if task is None else 1 + TASKS.index(task)) for task in tasks])
    return torch.nn.functional.one_hot(first[:, None] + torch.arange(TOKENS), TEXT).float()


def rotary(transformer: Any, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, head] of the positions of the image tokens of latents of that size.

    Positions are counted in tokens of the size that the model is made for, so that those of coarser latents lie further
    apart, and a place in the image keeps its position.
    """
    config = transformer.config
    grid = (height // config.patch_size, width // config.patch_size)
    full = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    cos, sin = get_3d_rotary_pos_embed(config.attention_head_dim, ((0, 0), full), grid, temporal_size=frames)
    return cos.to(transformer.device), sin.to(transformer.device)
