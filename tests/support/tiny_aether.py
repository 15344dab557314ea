"""Aether's parts with random weights at a tiny size, saved in the layout of the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .tiny import randomized

__all__ = ["FRAMES", "HEIGHT", "WIDTH", "save_tiny_aether"]

FRAMES, HEIGHT, WIDTH = 9, 32, 48
"""3 latent frames of 4 x 6 latent pixels: 18 image tokens."""
TOKENS, TEXT = 4, 8


def save_tiny_aether(folder: Path) -> tuple[Path, Path]:
    """Saves all parts; the folders of the transformer's page and of that with the other parts."""
    torch.manual_seed(0)
    weights, base = folder / "AetherV1", folder / "CogVideoX-5b-I2V"
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=96, out_channels=56, time_embed_dim=8,
        text_embed_dim=TEXT, num_layers=2, sample_frames=FRAMES, sample_height=HEIGHT // 8, sample_width=WIDTH // 8,
        max_text_seq_length=TOKENS, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    randomized(transformer).save_pretrained(weights / "transformer")
    autoencoder: Any = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), down_block_types=("CogVideoXDownBlock3D",) * 4, layers_per_block=1,
        up_block_types=("CogVideoXUpBlock3D",) * 4, norm_num_groups=2, latent_channels=16, temporal_compression_ratio=4,
        scaling_factor=0.7, invert_scale_latents=True,
    )  # fmt: skip
    autoencoder.save_pretrained(base / "vae")
    encoder = T5EncoderModel(T5Config(vocab_size=4, d_model=TEXT, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    encoder.save_pretrained(base / "text_encoder")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(
        base / "tokenizer"
    )
    scheduler: Any = CogVideoXDPMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True,
        snr_shift_scale=1.0, set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.save_pretrained(base / "scheduler")
    return weights, base
