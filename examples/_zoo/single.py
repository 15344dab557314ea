"""One stream, of image tokens alone or of image and text."""

from __future__ import annotations

from math import prod
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings

from .base import BATCH, FRAMES, GRID, HEIGHT, TEXT, WIDTH, Sample, entry, ids, mask, normal, rotary, shares, steps


@entry
def lumina_next() -> Sample:
    return Sample(
        diffusers.LuminaNextDiT2DModel(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=4,
            num_kv_heads=2, multiple_of=16, learn_sigma=False, cross_attention_dim=20,
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_mask": mask(),
         "image_rotary_emb": embeddings.get_2d_rotary_pos_embed_lumina(8, 16, 16), "cross_attention_kwargs": {}},
    )  # fmt: skip


@entry
def lumina2() -> Sample:
    return Sample(
        diffusers.Lumina2Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(30, 16, 16),
            cap_feat_dim=20,
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": torch.ones(BATCH, TEXT).bool()},
    )  # fmt: skip


@entry
def z_image() -> Sample:
    """Image and text, each padded to 32 tokens and refined on its own, then in one sequence."""
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, cap_feat_dim=20, axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
    )  # fmt: skip
    model.rope_embedder(torch.zeros(1, 3, dtype=torch.int32))  # as in bria_fibo2
    return Sample(
        model,
        {"x": [normal(4, 1, HEIGHT, WIDTH)], "t": shares(1), "cap_feats": [normal(TEXT, 20)]},
        time="t",
        latents="x",
    )  # fmt: skip


@entry
def omnigen() -> Sample:
    tokens = TEXT + 1 + HEIGHT * WIDTH // 4
    return Sample(
        diffusers.OmniGenTransformer2DModel(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=40, num_layers=3,
            pad_token_id=0, vocab_size=100, in_channels=4, time_step_dim=16,
            rope_scaling={"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": shares(),
         "input_ids": torch.randint(1, 100, (BATCH, TEXT)), "input_img_latents": [], "input_image_sizes": {},
         "attention_mask": torch.ones(BATCH, tokens, tokens), "position_ids": torch.arange(tokens).repeat(BATCH, 1)},
    )  # fmt: skip


@entry
def ernie_image() -> Sample:
    return Sample(
        diffusers.ErnieImageTransformer2DModel(
            hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=40, in_channels=4, out_channels=4,
            patch_size=1, text_in_dim=20, rope_axes_dim=(4, 6, 6),
        ),
        {"hidden_states": normal(BATCH, 4, 4, 6), "timestep": steps(), "text_bth": normal(BATCH, TEXT, 20),
         "text_lens": torch.tensor([TEXT, TEXT - 2])},
    )  # fmt: skip


@entry
def minimax_h3() -> Sample:
    """Text, a conditioning frame, audio and video in one packed sequence; where each lies is an argument."""
    places = torch.arange(84)  # 7 of text, 24 of the first frame, 5 of audio, 48 of video
    return Sample(
        diffusers.MiniMaxH3Transformer3DModel(
            num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2, num_refiner_layers=1,
            ffn_dim=40, in_channels=4, audio_in_channels=6, text_dim=20, freq_dim=32, time_embed_hidden_dim=18,
            time_embed_dim=14, rope_freq_dim=2,
        ),
        {"hidden_states": normal(BATCH, 72, 16), "audio_hidden_states": normal(BATCH, 5, 6),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "timestep": torch.tensor([0.9, 0.0]),
         "timestep_indices": ((places < 31).long()), "token_tags": (places < 7).long() + 2 * ((places > 30) & (places < 36)),
         "position_ids": torch.stack([places // 24, places // 6 % 4, places % 6], dim=1),
         "video_indices": torch.cat([places[7:31], places[36:]]), "audio_indices": places[31:36],
         "text_indices": places[:7]},
        grid=(1, 1, 84),
    )  # fmt: skip


@entry
def cosmos3() -> Sample:
    """A packed sequence without a batch; text attends to itself, causally, and frames to it; the first frame is given."""
    text, video = torch.arange(TEXT), torch.arange(prod(GRID))
    return Sample(
        diffusers.Cosmos3OmniTransformer(
            head_dim=12, hidden_size=20, intermediate_size=28, latent_channel=4, num_attention_heads=2,
            num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=16, vocab_size=50, rope_axes_dim=[2, 2, 2],
        ),
        {"input_ids": torch.randint(50, (TEXT,)), "text_indexes": text,
         "position_ids": torch.stack([torch.cat([text, TEXT + p]) for p in (video // 24, video // 6 % 4, video % 6)]),
         "und_len": TEXT, "sequence_length": TEXT + len(video), "vision_tokens": [normal(1, 4, FRAMES, HEIGHT, WIDTH)],
         "vision_token_shapes": [GRID], "vision_sequence_indexes": TEXT + video,
         "vision_mse_loss_indexes": TEXT + video[24:], "vision_timesteps": torch.full((48,), 900.0),
         "vision_noisy_frame_indexes": [torch.arange(1, FRAMES)]},
        time="vision_timesteps",
        latents="vision_tokens",
    )  # fmt: skip


@entry
def dit() -> Sample:
    return Sample(
        diffusers.DiTTransformer2DModel(
            in_channels=4, out_channels=8, num_attention_heads=4, attention_head_dim=8, num_layers=2,
            num_embeds_ada_norm=8, sample_size=8,
        ),
        {"hidden_states": normal(BATCH, 4, 8, 8), "timestep": steps(), "class_labels": torch.tensor([3, 5])},
    )  # fmt: skip


@entry
def prx() -> Sample:
    """Queries of the image alone; text only as keys and values."""
    return Sample(
        diffusers.PRXTransformer2DModel(
            in_channels=4, patch_size=2, context_in_dim=20, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
            axes_dim=[8, 8],
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "attention_mask": mask().bool()},
    )  # fmt: skip


@entry
def hunyuan_dit() -> Sample:
    """Long skip connections: the second half of the layers reads the first's."""
    return Sample(
        diffusers.HunyuanDiT2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
            cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=10, hidden_size=32, text_len=5,
            text_len_t5=6, activation_fn="gelu-approximate",
        ),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps().float(),
         "encoder_hidden_states": normal(BATCH, 5, 12), "text_embedding_mask": torch.ones(BATCH, 5),
         "encoder_hidden_states_t5": normal(BATCH, 6, 16), "text_embedding_mask_t5": torch.ones(BATCH, 6),
         "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * BATCH),
         "style": torch.zeros(BATCH, dtype=torch.long), "image_rotary_emb": rotary(24, 8)},
    )  # fmt: skip


@entry
def krea2() -> Sample:
    """Text from several layers of its encoder, fused by attention over layers; keys of fewer heads; gates in the heads."""
    return Sample(
        diffusers.Krea2Transformer2DModel(
            in_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=40, timestep_embed_dim=12, text_hidden_dim=20, num_text_layers=3,
            text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=24,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
        ),
        {"hidden_states": normal(BATCH, 24, 8), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 3, 20), "encoder_attention_mask": mask().bool(),
         "position_ids": torch.cat([ids(TEXT, 3), ids(24, 3, 6)])},
        grid=(1, 4, 6),
    )  # fmt: skip


@entry
def qwen_image_21() -> Sample:
    """Image tokens take their places in the text; blocks see what comes before them."""
    slots = torch.zeros(BATCH, TEXT + 4 + 6, dtype=torch.bool)
    slots[:, 3:7] = slots[:, TEXT + 4 :] = True  # a reference of 4 x 4 tokens in the text, the image of 4 x 6 behind it
    return Sample(
        diffusers.QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            context_in_dim=20, axes_dims_rope=(4, 6, 6),
        ),
        {"hidden_states": normal(BATCH, 16 + 24, 8), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT + 4, 20), "encoder_hidden_states_mask": mask(TEXT + 4).bool(),
         "img_shapes": [[(1, 4, 4), (1, 4, 6)]] * BATCH, "img_mask": slots},
        grid=(1, 4, 6),
    )  # fmt: skip


@entry
def bria_fibo2() -> Sample:
    """Text squeezed into a few tokens in front of the image, an image to edit behind it, cross-attention in one layer."""
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=20,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=6, gist_step=2,
        gist_min_text_len=4, gist_max_text_len=12, axes_dims=(4, 6, 6), axes_lens=(16, 8, 8),
    )  # fmt: skip
    model.rope_embedder(
        torch.zeros(1, 3, dtype=torch.int32)
    )  # makes the tables of the first call, which breaks a graph
    return Sample(
        model,
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, 2, TEXT, 20), "context_latents": [normal(BATCH, 4, 6, 10)]},
    )  # fmt: skip


@entry
def ideogram4() -> Sample:
    """Text and image in one sequence, told apart by indicators; output for all tokens; padding in front of the text."""
    segments, indicator = torch.zeros(2, BATCH, TEXT + 24, dtype=torch.long)
    segments[-1, :2] = -1
    indicator[:, :TEXT], indicator[:, TEXT:] = 3, 2
    places = torch.cat([torch.arange(TEXT)[:, None].expand(TEXT, 3), 65536 + ids(24, 3, 6).long()])
    return Sample(
        diffusers.Ideogram4Transformer2DModel(
            in_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=40,
            adaln_dim=12, llm_features_dim=20, mrope_section=(4, 2, 2),
        ),
        {"hidden_states": normal(BATCH, TEXT + 24, 8), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT + 24, 20), "position_ids": places.repeat(BATCH, 1, 1),
         "segment_ids": segments, "indicator": indicator},
        grid=(1, 1, TEXT + 24),
    )  # fmt: skip


def _nucleus(**options: Any) -> Sample:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, joint_attention_dim=20, axes_dims_rope=(4, 6, 6), mlp_ratio=6.0, num_experts=3,
        moe_intermediate_dim=24, capacity_factors=1.0, **options,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "experts" in name and parameter.dim() == 3:  # diffusers leaves them to the checkpoint: torch.empty
            torch.nn.init.normal_(parameter, std=0.2)
    return Sample(
        model,
        {"hidden_states": normal(BATCH, 24, 8), "timestep": shares(), "img_shapes": [(1, 4, 6)] * BATCH,
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_hidden_states_mask": mask().bool()},
        grid=(1, 4, 6),
    )  # fmt: skip


@entry
def nucleus_moe() -> Sample:
    """From the second layer on, experts that choose their tokens, as many as there are places."""
    return _nucleus(dense_moe_strategy="leave_first_block_dense")


@entry
def nucleus_dense() -> Sample:
    """Without experts: queries of the image alone, text of its own for each layer, keys of fewer heads."""
    return _nucleus(moe_enabled=False)
