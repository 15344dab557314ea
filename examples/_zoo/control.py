"""ControlNets, transformers that take their samples between the layers, and a transformer of several kinds of norms."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from .base import BATCH, HEIGHT, TEXT, WIDTH, Sample, entry, ids, mask, normal, rotary, shares, steps

TOKENS = 24
"""Tokens of an image of 8 x 12 in patches of 2 x 2."""
GRID = (1, 4, 6)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _tensors(part)]


class _OneOutput:
    """A ControlNet that gives the samples of all layers side by side, so that all of them count in what is compared."""

    def forward(self, **inputs: Any) -> Tensor:
        return torch.cat(_tensors(super().forward(**inputs)), dim=-1)  # type: ignore[misc]


class _Flux(_OneOutput, diffusers.FluxControlNetModel):  # type: ignore[misc]
    pass


class _SD3(_OneOutput, diffusers.SD3ControlNetModel):  # type: ignore[misc]
    pass


class _QwenImage(_OneOutput, diffusers.QwenImageControlNetModel):  # type: ignore[misc]
    pass


class _HunyuanDiT(_OneOutput, diffusers.HunyuanDiT2DControlNetModel):  # type: ignore[misc]
    pass


class _Sana(_OneOutput, diffusers.SanaControlNetModel):  # type: ignore[misc]
    pass


def _flux() -> tuple[dict[str, Any], dict[str, Any]]:
    """(configuration, inputs)"""
    return (
        {"patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": [4, 4, 8], "pooled_projection_dim": 12,
         "guidance_embeds": True},
        {"hidden_states": normal(BATCH, TOKENS, 8), "timestep": shares(), "guidance": torch.tensor([3.5] * BATCH),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "pooled_projections": normal(BATCH, 12),
         "img_ids": ids(TOKENS, 3, 6), "txt_ids": ids(TEXT, 3)},
    )  # fmt: skip


@entry
def flux_controlled() -> Sample:
    options, inputs = _flux()
    samples = {
        "controlnet_block_samples": [normal(BATCH, TOKENS, 32)],
        "controlnet_single_block_samples": [normal(BATCH, TOKENS, 32)],
    }
    return Sample(diffusers.FluxTransformer2DModel(**options), inputs | samples, grid=GRID)


@entry
def flux_controlnet() -> Sample:
    options, inputs = _flux()
    return Sample(_Flux(**options), inputs | {"controlnet_cond": normal(BATCH, TOKENS, 8)}, grid=GRID)


def _sd3() -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 20, "pooled_projection_dim": 12,
         "out_channels": 4, "pos_embed_max_size": 24},
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "pooled_projections": normal(BATCH, 12)},
    )  # fmt: skip


@entry
def sd3_controlled() -> Sample:
    options, inputs = _sd3()
    samples = [normal(BATCH, TOKENS, 32) for _ in range(2)]
    return Sample(diffusers.SD3Transformer2DModel(**options), inputs | {"block_controlnet_hidden_states": samples})


@entry
def sd3_controlnet() -> Sample:
    options, inputs = _sd3()
    return Sample(_SD3(**options), inputs | {"controlnet_cond": normal(BATCH, 4, HEIGHT, WIDTH)})


def _qwen_image() -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6)},
        {"hidden_states": normal(BATCH, TOKENS, 16), "timestep": shares(), "img_shapes": [GRID] * BATCH,
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_hidden_states_mask": mask().long()},
    )  # fmt: skip


@entry
def qwen_image_controlled() -> Sample:
    options, inputs = _qwen_image()
    samples = [normal(BATCH, TOKENS, 32) for _ in range(2)]
    return Sample(
        diffusers.QwenImageTransformer2DModel(**options), inputs | {"controlnet_block_samples": samples}, grid=GRID
    )


@entry
def qwen_image_controlnet() -> Sample:
    options, inputs = _qwen_image()
    return Sample(_QwenImage(**options), inputs | {"controlnet_cond": normal(BATCH, TOKENS, 16)}, grid=GRID)


@entry
def hunyuan_dit_controlnet() -> Sample:
    return Sample(
        _HunyuanDiT(
            conditioning_channels=3, sample_size=8, patch_size=2, in_channels=4, transformer_num_layers=6,
            attention_head_dim=8, num_attention_heads=4, cross_attention_dim=12, cross_attention_dim_t5=16,
            pooled_projection_dim=10, hidden_size=32, text_len=5, text_len_t5=6,
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps().float(),
         "controlnet_cond": normal(BATCH, 4, HEIGHT, WIDTH),
         "encoder_hidden_states": normal(BATCH, 5, 12), "text_embedding_mask": torch.ones(BATCH, 5),
         "encoder_hidden_states_t5": normal(BATCH, 6, 16), "text_embedding_mask_t5": torch.ones(BATCH, 6),
         "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * BATCH),
         "style": torch.zeros(BATCH, dtype=torch.long), "image_rotary_emb": rotary(TOKENS, 8)},
    )  # fmt: skip


@entry
def sana_controlnet() -> Sample:
    return Sample(
        _Sana(
            patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=20,
            sample_size=8,
        ),
        {"hidden_states": normal(BATCH, 4, 4, 6), "timestep": steps(), "controlnet_cond": normal(BATCH, 4, 4, 6),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask()},
    )  # fmt: skip


@entry
def transformer_2d() -> Sample:
    """The transformer of a U-Net, with time in its norms, on its own."""
    return Sample(
        diffusers.Transformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, norm_num_groups=2,
            cross_attention_dim=20, norm_type="ada_norm", num_embeds_ada_norm=1000, norm_elementwise_affine=False,
        ),
        {"hidden_states": normal(BATCH, 4, 4, 6), "timestep": steps(1)[0],
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask()},
    )  # fmt: skip


@entry
def transformer_2d_patches() -> Sample:
    """The same class as PixArt used it, with self-attention twice in a layer."""
    return Sample(
        diffusers.Transformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2, norm_type="ada_norm_single", norm_elementwise_affine=False, num_embeds_ada_norm=1000,
            double_self_attention=True, use_additional_conditions=False,
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps(),
         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    )  # fmt: skip
