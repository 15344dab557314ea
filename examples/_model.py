"""The world model of the examples: Aether's layout at any size, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

RGB, DISPARITY, CAMERA, CONDITION = 16, 16, 24, 40
LATENT = RGB + DISPARITY + CAMERA
"""Channels that are denoised; those of the condition come on top, as input only."""
HEAD = 64
"""Channels of an attention head."""


@dataclass(frozen=True)
class Setting:
    """Sizes of a world model, and where it runs."""

    layers: int
    heads: int
    size: tuple[int, int, int]
    """(frames, height, width) in latent pixels; a token is 1 x 2 x 2 of them."""
    text: tuple[int, int] = (32, 512)
    """(tokens, width)"""
    time_width: int = 256
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        width, dtype = HEAD * self.heads, str(self.dtype).removeprefix("torch.")
        tokens = f"{self.tokens} image + {self.text[0]} text tokens"
        return f"{self.layers} layers of width {width}, {tokens}, batch 2, {dtype}"

    @property
    def tokens(self) -> int:
        """Image tokens."""
        frames, height, width = self.size
        return frames * (height // 2) * (width // 2)


def world_model(setting: Setting) -> Any:
    """A CogVideoX transformer in eval mode; its latents are RGB, disparity and camera raymap, concatenated on channels."""
    frames, height, width = setting.size
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(
        setting.dtype
    )  # weights are drawn in their own dtype: float32 ones would take twice the memory
    try:
        with torch.device(setting.device):
            model = CogVideoXTransformer3DModel(
                num_attention_heads=setting.heads,
                attention_head_dim=HEAD,
                in_channels=LATENT + CONDITION,
                out_channels=LATENT,
                time_embed_dim=setting.time_width,
                text_embed_dim=setting.text[1],
                num_layers=setting.layers,
                sample_frames=4 * (frames - 1) + 1,
                sample_height=height,
                sample_width=width,
                max_text_seq_length=setting.text[0],
                use_rotary_positional_embeddings=True,
            )
    finally:
        torch.set_default_dtype(usual)
    return model.eval().requires_grad_(False)


def rotary(setting: Setting) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, HEAD] of the positions of the image tokens."""
    frames, height, width = setting.size
    grid = (height // 2, width // 2)
    cos, sin = get_3d_rotary_pos_embed(HEAD, ((0, 0), grid), grid, temporal_size=frames)
    return cos.to(setting.device), sin.to(setting.device)
