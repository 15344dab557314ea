"""Self-attention of the image, cross-attention to the text."""

from __future__ import annotations

import types
from math import prod
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_sana_wm_refiner
from torch import Tensor

from .base import BATCH, FRAMES, GRID, HEIGHT, TEXT, WIDTH, Sample, entry, mask, normal, shares, steps


@entry
def ltx() -> Sample:
    return Sample(
        diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            num_layers=2, caption_channels=20,
        ),
        {"hidden_states": normal(BATCH, prod(GRID), 8), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask(), "num_frames": FRAMES,
         "height": GRID[1], "width": GRID[2], "rope_interpolation_scale": (8 / 25, 32, 32)},
        grid=GRID,
    )  # fmt: skip


@entry
def helios() -> Sample:
    """Tokens of past frames in front of the image's, at timestep 0; only the image's attend to the text."""
    return Sample(
        diffusers.HeliosTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=18, freq_dim=32,
            ffn_dim=40, num_layers=2, rope_dim=(4, 4, 4), is_amplify_history=True,
        ),
        {"hidden_states": normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 18), "latents_history_short": normal(BATCH, 4, 2, HEIGHT, WIDTH),
         "latents_history_mid": normal(BATCH, 4, 2, HEIGHT, WIDTH),
         "latents_history_long": normal(BATCH, 4, 4, HEIGHT, WIDTH),
         "indices_latents_history_long": torch.arange(4).expand(BATCH, -1),
         "indices_latents_history_mid": torch.arange(4, 6).expand(BATCH, -1),
         "indices_latents_history_short": torch.tensor([0, 6]).expand(BATCH, -1),
         "indices_hidden_states": torch.arange(7, 10).expand(BATCH, -1)},
    )  # fmt: skip


def _pixart(kind: str, **options: Any) -> Any:
    return getattr(diffusers, kind)(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, cross_attention_dim=32,
        caption_channels=20, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, sample_size=8, patch_size=2,
        **options,
    )  # fmt: skip


@entry
def pixart() -> Sample:
    return Sample(
        _pixart("PixArtTransformer2DModel", num_layers=2, use_additional_conditions=False),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask(),
         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    )  # fmt: skip


@entry
def latte() -> Sample:
    """Attention over space and over time in turns: the frames move into the batch and back."""
    return Sample(
        _pixart("LatteTransformer3DModel", num_layers=2, video_length=FRAMES),
        {"hidden_states": normal(BATCH, 4, FRAMES, 8, 8), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20)},
    )  # fmt: skip


@entry
def allegro() -> Sample:
    *angles, t, h, w = embeddings.get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), GRID[1:]), grid_size=GRID[1:], temporal_size=FRAMES
    )
    places = torch.cartesian_prod(t.long(), h.long(), w.long()).T
    return Sample(
        diffusers.AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
            cross_attention_dim=48, sample_width=WIDTH, sample_height=HEIGHT, sample_frames=FRAMES, caption_channels=20,
        ),
        {"hidden_states": normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask(),
         "attention_mask": torch.ones(BATCH, FRAMES, HEIGHT, WIDTH),
         "image_rotary_emb": (tuple(angles), tuple(p[None].contiguous() for p in places))},
    )  # fmt: skip


@entry
def cosmos() -> Sample:
    _without_torchvision()
    return Sample(
        diffusers.CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2,
            text_embed_dim=20, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        ),
        {"hidden_states": normal(1, 4, FRAMES, HEIGHT, WIDTH), "timestep": steps(1),
         "encoder_hidden_states": normal(1, TEXT, 20), "attention_mask": torch.ones(1, TEXT), "fps": 30,
         "padding_mask": torch.zeros(1, 1, HEIGHT, WIDTH)},
    )  # fmt: skip


def _without_torchvision() -> None:
    """Cosmos resizes its padding mask with torchvision; the same by torch, where that is not installed."""
    from diffusers.models.transformers import transformer_cosmos

    def resize(mask: Tensor, size: Any, interpolation: Any = None) -> Tensor:
        return torch.nn.functional.interpolate(mask, size=size, mode="nearest")

    if not hasattr(transformer_cosmos, "transforms"):
        transformer_cosmos.transforms = types.SimpleNamespace(
            functional=types.SimpleNamespace(resize=resize),
            InterpolationMode=types.SimpleNamespace(NEAREST="nearest"),
        )


@entry
def kandinsky5() -> Sample:
    return Sample(
        diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, in_text_dim=20, in_text_dim2=12, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
            model_dim=32, ff_dim=40, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
        ),
        {"hidden_states": normal(1, FRAMES, HEIGHT, WIDTH, 4), "timestep": steps(1).float(),
         "encoder_hidden_states": normal(1, TEXT, 20), "pooled_projections": normal(1, 12),
         "visual_rope_pos": [torch.arange(n) for n in GRID], "text_rope_pos": torch.arange(TEXT)},
    )  # fmt: skip


def _kandinsky6(audio: bool) -> Sample:
    inputs = {
        "hidden_states": normal(BATCH, FRAMES, HEIGHT, WIDTH, 9), "timestep": steps().float(),
        "encoder_hidden_states": normal(BATCH, TEXT, 20), "pooled_projections": normal(BATCH, 12),
        "visual_rope_pos": (torch.tensor([0, 1, 0]), *(torch.arange(n) for n in GRID[1:])),
        "visual_token_type_ids": torch.tensor([[0, 0, 1]] * BATCH), "encoder_attention_mask": mask().bool(),
    }  # fmt: skip
    if audio:
        inputs["audio_hidden_states"] = normal(BATCH, 5, 6)
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=20, in_text_dim2=12, time_dim=16, model_dim=32, ff_dim=40,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), in_audio_dim=6, out_audio_dim=6, model_dim_a=48,
        time_dim_a=14, ff_dim_a=28, axes_dims_a=(4, 6, 6), text_token_padding=True, ca_rope=True, cross_gates=True,
        fix_modulation=True, visual_token_type_num_embeddings=2,
    )  # fmt: skip
    return Sample(model, inputs)


@entry
def kandinsky6() -> Sample:
    """Video and audio that attend to each other; the last frame is a reference."""
    return _kandinsky6(audio=True)


@entry
def kandinsky6_silent() -> Sample:
    return _kandinsky6(audio=False)


@entry
def sana() -> Sample:
    """Linear attention, and an FFN with convolutions over neighbours."""
    return Sample(
        diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=20,
            sample_size=8,
        ),
        {"hidden_states": normal(BATCH, 4, 4, 6), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask()},
    )  # fmt: skip


@entry
def sana_video() -> Sample:
    return Sample(
        diffusers.SanaVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=20,
            sample_size=8,
        ),
        {"hidden_states": normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask()},
    )  # fmt: skip


@entry
def sana_wm() -> Sample:
    """A world model: cameras in the attention, softmax attention in every second layer, a timestep for each frame.

    Linear attention goes frame by frame, and its graph grows with them: two will do.
    """
    frames = 2
    places = normal(BATCH, frames, 3)
    cameras = torch.eye(4).repeat(BATCH, frames, 1, 1)
    cameras[..., :3, 3] = places
    optics = torch.tensor([5.0, 5.5, 3.0, 2.0]).expand(BATCH, frames, 4)
    return Sample(
        diffusers.SanaWMTransformer3DModel(
            in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16,
            chunk_plucker_channels=5, caption_channels=20,
        ),
        {"hidden_states": normal(BATCH, 4, frames, 4, 6), "timestep": torch.tensor([[[0, 900]]] * BATCH),
         "encoder_hidden_states": normal(BATCH, 1, TEXT, 20), "encoder_attention_mask": mask(),
         "camera_conditions": torch.cat([cameras.flatten(2), optics], dim=2),
         "chunk_plucker": normal(BATCH, 5, frames, 4, 6)},
    )  # fmt: skip


@entry
def sana_wm_refiner() -> Sample:
    """A block of frames that attends to cached keys of the first frame and of those before it."""
    model = diffusers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=20, rope_type="split",
    )  # fmt: skip
    cache = transformer_sana_wm_refiner.SanaWMRefinerKVCache(2)
    for layer in range(2):
        cache.get(layer).store_sink(normal(BATCH, 24, 16), normal(BATCH, 24, 16))
        cache.get(layer).store_history(normal(BATCH, 24, 16), normal(BATCH, 24, 16))

    def places(*frames: int) -> Any:
        return model.build_rotary_emb_for_absolute_positions(BATCH, list(frames), *GRID[1:], torch.device("cpu"), 24.0)

    cache.sink_pe = places(3)
    return Sample(
        model,
        {"hidden_states": normal(BATCH, prod(GRID), 8), "encoder_hidden_states": normal(BATCH, TEXT, 20),
         "timestep": torch.full((BATCH, prod(GRID)), 900.0), "video_rotary_emb": places(5, 6, 7),
         "encoder_attention_mask": mask(), "kv_cache": cache, "kv_cache_mode": "inject"},
        grid=GRID,
    )  # fmt: skip


@entry
def stable_audio() -> Sample:
    return Sample(
        diffusers.StableAudioDiTModel(
            sample_size=24, in_channels=6, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            num_key_value_attention_heads=1, out_channels=6, cross_attention_dim=16, time_proj_dim=8,
            global_states_input_dim=12, cross_attention_input_dim=20,
        ),
        {"hidden_states": normal(BATCH, 6, 24), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "global_hidden_states": normal(BATCH, 1, 12),
         "rotary_embedding": embeddings.get_1d_rotary_pos_embed(8, 25, use_real=True, repeat_interleave_real=False)},
        grid=(1, 1, 24),
    )  # fmt: skip


@entry
def dreamlite() -> Sample:
    """The transformer of a U-Net, with time in its norms: convolutions and a skip connection around it."""
    return Sample(
        diffusers.DreamLiteTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, norm_num_groups=2,
            cross_attention_dim=20, norm_type="ada_norm_zero", num_embeds_ada_norm=10, norm_elementwise_affine=False,
            qk_norm="rms_norm", ff_mult=2,
        ),
        {"hidden_states": normal(BATCH, 4, 4, 6), "timestep": steps(), "class_labels": torch.tensor([3, 5]),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask()},
    )  # fmt: skip
