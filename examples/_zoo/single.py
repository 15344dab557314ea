"""One stream, of image tokens alone or of image and text."""

from __future__ import annotations

from math import prod

import diffusers
import torch
from diffusers.models import embeddings

from .base import BATCH, FRAMES, GRID, HEIGHT, TEXT, WIDTH, Sample, entry, mask, normal, rotary, shares, steps


@entry
def lumina_next() -> Sample:
    return Sample(
        diffusers.LuminaNextDiT2DModel(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=4,
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
    return Sample(
        diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=3, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=20, axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
        ),
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
            hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=40, in_channels=4, out_channels=4,
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
            num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=3, num_refiner_layers=1,
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
            num_hidden_layers=3, num_key_value_heads=1, patch_latent_dim=16, vocab_size=50, rope_axes_dim=[2, 2, 2],
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
            in_channels=4, out_channels=8, num_attention_heads=4, attention_head_dim=8, num_layers=3,
            num_embeds_ada_norm=8, sample_size=8,
        ),
        {"hidden_states": normal(BATCH, 4, 8, 8), "timestep": steps(), "class_labels": torch.tensor([3, 5])},
    )  # fmt: skip


@entry
def prx() -> Sample:
    """Queries of the image alone; text only as keys and values."""
    return Sample(
        diffusers.PRXTransformer2DModel(
            in_channels=4, patch_size=2, context_in_dim=20, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3,
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
