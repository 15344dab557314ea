"""Self-attention by flex_attention: sparse, or to the keys of chunks that were made before."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.transformers import transformer_wan_animate_2

from .base import BATCH, FRAMES, HEIGHT, TEXT, WIDTH, Sample, entry, normal, steps


@entry
def anyflow_far() -> Sample:
    """A chunk of frames that attends to cached keys of the chunks before it, the oldest compressed."""
    chunks, flags = [1, 1, 1, FRAMES], {"num_cached_chunks": 3, "is_cache_step": False}
    caches = [
        {"full_cache": normal(2, BATCH, 2, 3 * FRAMES * 24, 16), "compressed_cache": normal(2, BATCH, 2, 12, 16)}
        for _ in range(3)
    ]
    return Sample(
        diffusers.AnyFlowFARTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=18, freq_dim=32,
            ffn_dim=40, num_layers=2, rope_max_seq_len=32,
        ),
        {"hidden_states": normal(BATCH, FRAMES, 4, HEIGHT, WIDTH), "encoder_hidden_states": normal(BATCH, TEXT, 18),
         "timestep": torch.full((BATCH, FRAMES), 900.0), "r_timestep": torch.full((BATCH, FRAMES), 800.0),
         "chunk_partition": chunks, "kv_cache": caches, "kv_cache_flag": flags},
    )  # fmt: skip


@entry
def kandinsky6_sr() -> Sample:
    """Tokens in blocks of 8 x 8, and attention between the blocks that their means choose."""
    return Sample(
        diffusers.Kandinsky6SRTransformer3DModel(
            in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=32, ff_dim=40, num_visual_blocks=2,
            axes_dims=(4, 6, 6), nabla_window=(1, 1, 1),
        ),
        {"hidden_states": normal(BATCH, FRAMES, 8, 16, 9), "timestep": steps().float()},
    )  # fmt: skip


@entry
def wan_animate_2() -> Sample:
    """A reference video's keys and values from a pass before, of which each frame sees those of its own."""
    cache = transformer_wan_animate_2.WanAnimate2KVCache(3)
    for layer in cache.layer_caches:
        layer.store(normal(BATCH, 48, 2, 12), normal(BATCH, 48, 2, 12))
    return Sample(
        diffusers.WanAnimate2Transformer3DModel(
            text_len=TEXT, in_dim=12, dim=24, ffn_dim=40, freq_dim=32, text_dim=18, out_dim=4, num_heads=2, num_layers=3
        ),
        {"hidden_states": [normal(8, FRAMES, HEIGHT, WIDTH) for _ in range(BATCH)],
         "condition_latents": [normal(4, FRAMES, HEIGHT, WIDTH) for _ in range(BATCH)],
         "encoder_hidden_states": [normal(TEXT - i, 18) for i in range(BATCH)], "timestep": steps(),
         "encoder_hidden_states_image": normal(BATCH, 9, 1280), "kv_cache": cache, "kv_cache_mode": "cached",
         "seq_len": 72, "reference_grid_sizes": torch.tensor([[2, 4, 6]] * BATCH), "origin_len": 4,
         "origin_area": [64, 96]},
    )  # fmt: skip
