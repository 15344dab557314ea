"""Two streams first, then one."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .base import BATCH, FRAMES, HEIGHT, TEXT, WIDTH, Sample, entry, ids, mask, normal, shares, steps


def _flux_like(kind: str, columns: int = 3, pooled: bool = True, **options: Any) -> Sample:
    settings = {
        "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": [4, 4, 8],
    }  # fmt: skip
    if pooled:
        settings["pooled_projection_dim"] = 12
    inputs = {
        "hidden_states": normal(BATCH, 24, 8), "timestep": shares(),
        "encoder_hidden_states": normal(BATCH, TEXT, 20), "img_ids": ids(24, columns, 6), "txt_ids": ids(TEXT, columns),
    }  # fmt: skip
    if pooled:
        inputs["pooled_projections"] = normal(BATCH, 12)
    if options.get("guidance_embeds"):
        inputs["guidance"] = torch.tensor([3.5] * BATCH)
    return Sample(getattr(diffusers, kind)(**(settings | options)), inputs, grid=(1, 4, 6))


@entry
def flux() -> Sample:
    return _flux_like("FluxTransformer2DModel", guidance_embeds=True)


@entry
def flux2() -> Sample:
    return _flux_like(
        "Flux2Transformer2DModel", columns=4, pooled=False, guidance_embeds=True, axes_dims_rope=[4, 4, 4, 4],
        timestep_guidance_channels=16,
    )  # fmt: skip


@entry
def chroma() -> Sample:
    return _flux_like(
        "ChromaTransformer2DModel", pooled=False, num_single_layers=1, approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=2,
    )  # fmt: skip


@entry
def bria() -> Sample:
    built = _flux_like("BriaTransformer2DModel", pooled=False, pooled_projection_dim=None, num_single_layers=1)
    return Sample(built.model, built.inputs | {"timestep": steps().float()}, grid=built.grid)


@entry
def ovis_image() -> Sample:
    return _flux_like("OvisImageTransformer2DModel", pooled=False, out_channels=8, num_single_layers=1)


@entry
def longcat_image() -> Sample:
    return _flux_like("LongCatImageTransformer2DModel", pooled=False, num_single_layers=1)


@entry
def auraflow() -> Sample:
    return Sample(
        diffusers.AuraFlowTransformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=20,
            out_channels=4, pos_embed_max_size=64,
        ),
        {"hidden_states": normal(BATCH, 4, 8, 8), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20)},
    )  # fmt: skip


@entry
def hunyuan_video() -> Sample:
    return Sample(
        diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=20, pooled_projection_dim=12, rope_axes_dim=(4, 6, 6),
        ),
        {"hidden_states": normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, 11, 20), "pooled_projections": normal(BATCH, 12),
         "encoder_attention_mask": mask(11, 3), "guidance": torch.tensor([6000.0] * BATCH)},
    )  # fmt: skip


@entry
def hunyuan_image() -> Sample:
    return Sample(
        diffusers.HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=2, num_refiner_layers=1, patch_size=(2, 2), text_embed_dim=20, rope_axes_dim=(8, 8),
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps().float(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask()},
    )  # fmt: skip


@entry
def framepack() -> Sample:
    """Tokens of past frames in front of the image's, coarser the older they are."""
    return Sample(
        diffusers.HunyuanVideoFramepackTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=2, num_refiner_layers=1, text_embed_dim=20, pooled_projection_dim=12,
            rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=14, has_clean_x_embedder=True,
        ),
        {"hidden_states": normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, 11, 20), "pooled_projections": normal(BATCH, 12),
         "encoder_attention_mask": mask(11, 3), "guidance": torch.tensor([6000.0] * BATCH),
         "image_embeds": normal(BATCH, 5, 14), "indices_latents": torch.arange(7, 10),
         "latents_clean": normal(BATCH, 4, 2, HEIGHT, WIDTH), "indices_latents_clean": torch.tensor([0, 10]),
         "latents_history_2x": normal(BATCH, 4, 2, HEIGHT, WIDTH), "indices_latents_history_2x": torch.arange(4, 6),
         "latents_history_4x": normal(BATCH, 4, 4, HEIGHT, WIDTH), "indices_latents_history_4x": torch.arange(4)},
    )  # fmt: skip


@entry
def flux3() -> Sample:
    """Layers for text, image and reference image apart, then joint ones; attention and FFN side by side; per-token gates."""
    return Sample(
        diffusers.Flux3Transformer2DModel(
            in_channels=8, cond_in_channels=6, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=20, timestep_channels=12, mlp_ratio=1.5,
            axes_dims_rope=(4, 4, 4, 4), flow_map=True,
        ),
        {"hidden_states": normal(BATCH, 24, 8), "timestep": shares(), "target_timestep": shares() - 0.1,
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "img_ids": ids(24, 4, 6), "txt_ids": ids(TEXT, 4),
         "image_cond_hidden_states": normal(BATCH, 10, 6), "image_cond_ids": ids(10, 4, 5)},
        grid=(1, 4, 6),
    )  # fmt: skip


def _hidream(experts: int, **inputs: Any) -> Sample:
    text = {
        "encoder_hidden_states_t5": normal(BATCH, 4, 12),
        "encoder_hidden_states_llama3": normal(3, BATCH, TEXT, 20),
    }
    return Sample(
        diffusers.HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, caption_channels=[12, 20], text_emb_dim=10, num_routed_experts=experts,
            num_activated_experts=1, axes_dims_rope=(4, 6, 6), max_resolution=(10, 12), llama_layers=[0, 1, 2],
        ),
        {"timesteps": steps(), "pooled_embeds": normal(BATCH, 10)} | text | inputs,
        time="timesteps",
    )  # fmt: skip


@entry
def motif_video() -> Sample:
    """Text cross-attention of what joint attention gives; a decoder that attends to what the layers before made."""
    return Sample(
        diffusers.MotifVideoTransformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=2, num_decoder_layers=1, mlp_ratio=2.0, text_embed_dim=20, image_embed_dim=14,
            rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
        ),
        {"hidden_states": normal(BATCH, 9, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask(),
         "image_embeds": normal(BATCH, 5, 14)},
    )  # fmt: skip


@entry
def hidream_image() -> Sample:
    """A mixture of experts, each of which computes as many tokens as choose it."""
    return _hidream(2, hidden_states=normal(BATCH, 4, 8, 8))


@entry
def hidream_image_dense() -> Sample:
    """Without experts; two tokens of padding behind those of the image; text tokens of its own in each layer."""
    real = torch.ones(BATCH, 26)
    real[:, 24:] = 0
    built = _hidream(
        0, hidden_states=normal(BATCH, 26, 16), hidden_states_masks=real, img_sizes=[(4, 6)] * BATCH,
        img_ids=ids(26, 3, 6).repeat(BATCH, 1, 1),
    )  # fmt: skip
    return Sample(built.model, built.inputs, time="timesteps", grid=(1, 4, 6))


@entry
def bria_fibo() -> Sample:
    """In every layer one half of each text token is replaced by what another layer of the text encoder says of it."""
    built = _flux_like("BriaFiboTransformer2DModel", pooled=False, text_encoder_dim=14)
    conditions = {
        "timestep": steps().float(), "text_encoder_layers": [normal(BATCH, TEXT, 14) for _ in range(3)],
        "joint_attention_kwargs": {"attention_mask": mask(TEXT + 24, 0).bool()[:, None, None]},
    }  # fmt: skip
    conditions["joint_attention_kwargs"]["attention_mask"][-1, :, :, TEXT - 2 : TEXT] = False
    return Sample(built.model, built.inputs | conditions, grid=built.grid)
