"""Wan and the models made of it: self-attention of the video, cross-attention to the text."""

from __future__ import annotations

from math import prod
from typing import Any

import diffusers
import torch

from .base import BATCH, FRAMES, GRID, HEIGHT, TEXT, WIDTH, Sample, entry, normal, steps


def _wan(kind: str = "WanTransformer3DModel", **options: Any) -> Any:
    settings = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 18, "freq_dim": 32, "ffn_dim": 40, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return getattr(diffusers, kind)(**(settings | options))


def _wan_inputs(channels: int = 4, text: int = TEXT, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": normal(BATCH, channels, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
        "encoder_hidden_states": normal(BATCH, text, 18), **more,
    }  # fmt: skip


@entry
def wan() -> Sample:
    return Sample(_wan(), _wan_inputs())


@entry
def wan_i2v() -> Sample:
    """A second cross-attention, to an image; the text must be 512 tokens long."""
    model = _wan(in_channels=12, image_dim=14, added_kv_proj_dim=24)
    return Sample(model, _wan_inputs(12, 512, encoder_hidden_states_image=normal(BATCH, 9, 14)))


@entry
def wan_per_token() -> Sample:
    """A timestep of its own for each token; those of the first frame are clean."""
    time = torch.full((BATCH, prod(GRID)), 900)
    time[:, : prod(GRID[1:])] = 0
    return Sample(_wan(), _wan_inputs() | {"timestep": time})


@entry
def wan_vace() -> Sample:
    """A second stack of layers on a control video, added to the first stack between its layers."""
    model = _wan("WanVACETransformer3DModel", num_layers=2, vace_layers=[0, 1], vace_in_channels=6)
    control = {
        "control_hidden_states": normal(BATCH, 6, FRAMES, HEIGHT, WIDTH),
        "control_hidden_states_scale": torch.ones(2),
    }
    return Sample(model, _wan_inputs() | control)


@entry
def wan_animate() -> Sample:
    """A face adapter after every second layer: the tokens of each frame attend to those of that frame's face."""
    model = _wan(
        "WanAnimateTransformer3DModel", in_channels=12, latent_channels=4, image_dim=14, added_kv_proj_dim=24,
        num_layers=2, motion_encoder_channel_sizes={"4": 6, "8": 5}, motion_encoder_size=8, motion_style_dim=10,
        motion_dim=3, motion_encoder_dim=9, face_encoder_hidden_dim=11, face_encoder_num_heads=2,
        inject_face_latents_blocks=2, motion_encoder_batch_size=4,
    )  # fmt: skip
    character = {
        "encoder_hidden_states_image": normal(BATCH, 9, 14), "pose_hidden_states": normal(BATCH, 4, FRAMES - 1, HEIGHT, WIDTH),
        "face_pixel_values": normal(BATCH, 3, 5, 8, 8),
    }  # fmt: skip
    return Sample(model, _wan_inputs(12, 512, **character))


@entry
def anyflow() -> Sample:
    """From one timestep to another, each a timestep for every frame; frames in front of channels."""
    return Sample(
        diffusers.AnyFlowTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=18, freq_dim=32,
            ffn_dim=40, num_layers=2, rope_max_seq_len=32,
        ),
        {"hidden_states": normal(BATCH, FRAMES, 4, HEIGHT, WIDTH), "encoder_hidden_states": normal(BATCH, TEXT, 18),
         "timestep": torch.full((BATCH, FRAMES), 900.0), "r_timestep": torch.full((BATCH, FRAMES), 800.0)},
    )  # fmt: skip


@entry
def chronoedit() -> Sample:
    return Sample(_wan("ChronoEditTransformer3DModel"), _wan_inputs())


@entry
def skyreels_v2() -> Sample:
    """A timestep for each frame."""
    model = _wan("SkyReelsV2Transformer3DModel", inject_sample_info=True)
    inputs = _wan_inputs() | {"timestep": torch.tensor([[100, 500, 900]] * BATCH), "fps": torch.tensor([0])}
    return Sample(model, inputs | {"enable_diffusion_forcing": True})
