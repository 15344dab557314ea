"""Two streams, text and image, that meet in joint attention."""

from __future__ import annotations

from math import prod
from typing import Any

import diffusers
import torch

from .base import BATCH, FRAMES, GRID, HEIGHT, TEXT, WIDTH, Sample, entry, mask, normal, rotary, shares, steps


def _cogvideox(**options: Any) -> Any:
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 20,
        "text_embed_dim": 24, "num_layers": 2, "sample_width": WIDTH, "sample_height": HEIGHT, "sample_frames": 9,
        "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    return diffusers.CogVideoXTransformer3DModel(**(settings | options))


@entry
def cogvideox() -> Sample:
    return Sample(
        _cogvideox(use_rotary_positional_embeddings=False),
        {"hidden_states": normal(BATCH, FRAMES, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 24)},
    )  # fmt: skip


@entry
def cogvideox_rotary() -> Sample:
    return Sample(
        _cogvideox(),
        {"hidden_states": normal(BATCH, FRAMES, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 24), "image_rotary_emb": rotary(prod(GRID), 16)},
    )  # fmt: skip


@entry
def cogvideox_1_5() -> Sample:
    """Patches of two frames, cut out by a linear layer."""
    return Sample(
        _cogvideox(patch_size_t=2, patch_bias=False, ofs_embed_dim=20, sample_frames=13),
        {"hidden_states": normal(BATCH, 4, 4, HEIGHT, WIDTH), "timestep": steps(), "ofs": torch.tensor([2.0]),
         "encoder_hidden_states": normal(BATCH, TEXT, 24), "image_rotary_emb": rotary(2 * prod(GRID[1:]), 16)},
    )  # fmt: skip


@entry
def consisid() -> Sample:
    """CogVideoX with cross-attention to a face in every second layer."""
    return Sample(
        diffusers.ConsisIDTransformer3DModel(
            num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=20,
            text_embed_dim=24, num_layers=2, sample_width=WIDTH, sample_height=HEIGHT, sample_frames=9,
            max_text_seq_length=TEXT, use_rotary_positional_embeddings=True, is_train_face=True,
            cross_attn_interval=2, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=6, LFE_vit_dim=10,
            LFE_depth=2, LFE_num_scale=2, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=3,
            LFE_output_dim=32,
        ),
        {"hidden_states": normal(BATCH, FRAMES, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 24), "image_rotary_emb": rotary(prod(GRID), 16),
         "id_cond": normal(BATCH, 6), "id_vit_hidden": [normal(BATCH, 4, 10) for _ in range(2)]},
    )  # fmt: skip


def _sd3(**options: Any) -> Sample:
    return Sample(
        diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=20, pooled_projection_dim=12, out_channels=4,
            pos_embed_max_size=24, **options,
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "pooled_projections": normal(BATCH, 12)},
    )  # fmt: skip


@entry
def sd3() -> Sample:
    return _sd3()


@entry
def sd3_5() -> Sample:
    """A second self-attention of the image beside the joint one."""
    return _sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


@entry
def qwen_image() -> Sample:
    return Sample(
        diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=20, axes_dims_rope=(4, 6, 6),
        ),
        {"hidden_states": normal(BATCH, 24, 16), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_hidden_states_mask": mask().long(),
         "img_shapes": [(1, 4, 6)] * BATCH},
        grid=(1, 4, 6),
    )  # fmt: skip


@entry
def qwen_image_edit() -> Sample:
    """A reference image's tokens behind those of the image, in one stream."""
    built = qwen_image()
    inputs = built.inputs | {
        "hidden_states": normal(BATCH, 24 + 12, 16),
        "img_shapes": [[(1, 4, 6), (1, 3, 4)]] * BATCH,
    }
    return Sample(built.model, inputs, grid=(1, 1, 36))


@entry
def cogview3plus() -> Sample:
    size = torch.tensor([[64, 96]] * BATCH)
    return Sample(
        diffusers.CogView3PlusTransformer2DModel(
            patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, out_channels=4,
            text_embed_dim=20, time_embed_dim=16, condition_dim=4, pos_embed_max_size=16, sample_size=8,
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "original_size": size, "target_size": size,
         "crop_coords": torch.zeros(BATCH, 2, dtype=torch.long)},
    )  # fmt: skip


@entry
def cogview4() -> Sample:
    size = torch.tensor([[64, 96]] * BATCH)
    return Sample(
        diffusers.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, out_channels=4,
            text_embed_dim=20, time_embed_dim=16, condition_dim=4,
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "original_size": size, "target_size": size,
         "crop_coords": torch.zeros(BATCH, 2, dtype=torch.long)},
    )  # fmt: skip


@entry
def mochi() -> Sample:
    return Sample(
        diffusers.MochiTransformer3DModel(
            patch_size=2, num_attention_heads=4, attention_head_dim=8, num_layers=2, pooled_projection_dim=20,
            in_channels=4, qk_norm="rms_norm", text_embed_dim=24, time_embed_dim=12, activation_fn="swiglu",
            max_sequence_length=TEXT,
        ),
        {"hidden_states": normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 24), "encoder_attention_mask": mask().bool()},
    )  # fmt: skip


@entry
def easyanimate() -> Sample:
    return Sample(
        diffusers.EasyAnimateTransformer3DModel(
            attention_head_dim=16, num_attention_heads=2, in_channels=4, mmdit_layers=1, num_layers=3, out_channels=4,
            patch_size=2, sample_height=HEIGHT, sample_width=WIDTH, text_embed_dim=20, time_embed_dim=16,
            time_position_encoding_type="3d_rope", timestep_activation_fn="silu",
        ),
        {"hidden_states": normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20)},
    )  # fmt: skip


@entry
def hunyuan_video_15() -> Sample:
    return Sample(
        diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3,
            num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=20, text_embed_2_dim=18,
            image_embed_dim=14, rope_axes_dim=(4, 6, 6), target_size=16,
        ),
        {"hidden_states": normal(BATCH, 9, FRAMES, 4, 6), "timestep": steps().float(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_hidden_states_2": normal(BATCH, 4, 18),
         "encoder_attention_mask": mask(), "encoder_attention_mask_2": mask(4, 1),
         "image_embeds": torch.zeros(BATCH, 3, 14)},
    )  # fmt: skip


@entry
def ltx2() -> Sample:
    """Video and audio, each with its text, attending to each other."""
    return Sample(
        diffusers.LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=2, caption_channels=20,
        ),
        {"hidden_states": normal(BATCH, prod(GRID), 8), "audio_hidden_states": normal(BATCH, 5, 4),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "audio_encoder_hidden_states": normal(BATCH, TEXT, 20),
         "timestep": steps(), "num_frames": FRAMES, "height": GRID[1], "width": GRID[2], "audio_num_frames": 5,
         "encoder_attention_mask": mask(), "audio_encoder_attention_mask": mask()},
        grid=GRID,
    )  # fmt: skip


@entry
def glm_image() -> Sample:
    """A token of a prior in each place of the image, dropped in the second element."""
    drop = torch.zeros(BATCH, 24, dtype=torch.bool)
    drop[1] = True
    return Sample(
        diffusers.GlmImageTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, text_embed_dim=20,
            time_embed_dim=16, condition_dim=4, prior_vq_quantizer_codebook_size=50,
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "prior_token_id": torch.randint(50, (BATCH, 24)),
         "prior_token_drop": drop, "target_size": torch.tensor([[64.0, 96.0]] * BATCH),
         "crop_coords": torch.zeros(BATCH, 2), "attention_mask": mask()},
    )  # fmt: skip


def _joyimage(kind: str) -> Any:
    return getattr(diffusers, kind)(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=20, mlp_width_ratio=2.0,
        num_layers=2, rope_dim_list=[4, 6, 6],
    )  # fmt: skip


@entry
def joyimage_edit() -> Sample:
    """The image behind the one to edit, as items of one input; the model puts it in front."""
    inputs = {
        "hidden_states": normal(BATCH, 2, 4, 1, HEIGHT, WIDTH), "timestep": steps(),
        "encoder_hidden_states": normal(BATCH, TEXT, 20),
    }  # fmt: skip
    return Sample(_joyimage("JoyImageEditTransformer3DModel"), inputs)


@entry
def joyimage_edit_plus() -> Sample:
    """Patches of an image and of one or two references of other sizes, padded; a rotary table for each element."""
    inputs = {
        "hidden_states": normal(BATCH, 41, 4, 1, 2, 2), "timestep": steps(),
        "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_hidden_states_mask": mask(),
        "shape_list": [[(1, 4, 6), (1, 3, 5)], [(1, 4, 6), (1, 2, 3), (1, 3, 3)]],
    }  # fmt: skip
    return Sample(_joyimage("JoyImageEditPlusTransformer3DModel"), inputs, grid=(1, 1, 41))
