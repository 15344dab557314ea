"""Self-attention of the image, cross-attention to the text."""

from __future__ import annotations

import types
from math import prod
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from torch import Tensor

from .base import BATCH, FRAMES, GRID, HEIGHT, TEXT, WIDTH, Sample, entry, mask, normal, shares, steps


def _wan(kind: str = "WanTransformer3DModel", **options: Any) -> Any:
    settings = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 18, "freq_dim": 32, "ffn_dim": 40, "num_layers": 3, "rope_max_seq_len": 32,
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
    model = _wan("WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=6)
    control = {
        "control_hidden_states": normal(BATCH, 6, FRAMES, HEIGHT, WIDTH),
        "control_hidden_states_scale": torch.ones(2),
    }
    return Sample(model, _wan_inputs() | control)


@entry
def chronoedit() -> Sample:
    return Sample(_wan("ChronoEditTransformer3DModel"), _wan_inputs())


@entry
def skyreels_v2() -> Sample:
    """A timestep for each frame."""
    model = _wan("SkyReelsV2Transformer3DModel", inject_sample_info=True)
    inputs = _wan_inputs() | {"timestep": torch.tensor([[100, 500, 900]] * BATCH), "fps": torch.tensor([0])}
    return Sample(model, inputs | {"enable_diffusion_forcing": True})


@entry
def ltx() -> Sample:
    return Sample(
        diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            num_layers=3, caption_channels=20,
        ),
        {"hidden_states": normal(BATCH, prod(GRID), 8), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask(), "num_frames": FRAMES,
         "height": GRID[1], "width": GRID[2], "rope_interpolation_scale": (8 / 25, 32, 32)},
        grid=GRID,
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
        _pixart("PixArtTransformer2DModel", num_layers=3, use_additional_conditions=False),
        {"hidden_states": normal(BATCH, 4, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask(),
         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    )  # fmt: skip


@entry
def latte() -> Sample:
    """Attention over space and over time in turns: the frames move into the batch and back."""
    return Sample(
        _pixart("LatteTransformer3DModel", num_layers=3, video_length=FRAMES),
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
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=3,
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
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3, mlp_ratio=2,
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
            model_dim=32, ff_dim=40, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
        ),
        {"hidden_states": normal(1, FRAMES, HEIGHT, WIDTH, 4), "timestep": steps(1).float(),
         "encoder_hidden_states": normal(1, TEXT, 20), "pooled_projections": normal(1, 12),
         "visual_rope_pos": [torch.arange(n) for n in GRID], "text_rope_pos": torch.arange(TEXT)},
    )  # fmt: skip


@entry
def sana() -> Sample:
    """Linear attention, and an FFN with convolutions over neighbours."""
    return Sample(
        diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
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
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=20,
            sample_size=8,
        ),
        {"hidden_states": normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": steps(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask()},
    )  # fmt: skip


@entry
def stable_audio() -> Sample:
    return Sample(
        diffusers.StableAudioDiTModel(
            sample_size=24, in_channels=6, num_layers=3, attention_head_dim=16, num_attention_heads=2,
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
            num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=3, norm_num_groups=2,
            cross_attention_dim=20, norm_type="ada_norm_zero", num_embeds_ada_norm=10, norm_elementwise_affine=False,
            qk_norm="rms_norm", ff_mult=2,
        ),
        {"hidden_states": normal(BATCH, 4, 4, 6), "timestep": steps(), "class_labels": torch.tensor([3, 5]),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask()},
    )  # fmt: skip
