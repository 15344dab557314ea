"""Tiny transformers of many classes of diffusers, with random weights and inputs: what examples/zoo.py and the tests run."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from torch import Tensor

__all__ = ["ZOO", "Sample", "sample"]

BATCH, TEXT = 2, 7
FRAMES, HEIGHT, WIDTH = 3, 8, 12
GRID = (FRAMES, HEIGHT // 2, WIDTH // 2)
"""Tokens of a video cut into patches of 1 x 2 x 2."""


@dataclass(frozen=True)
class Sample:
    """A model in eval mode and the keyword arguments of one call."""

    model: Any
    inputs: dict[str, Any]
    time: str = "timestep"
    """The argument with the diffusion time."""
    latents: str = "hidden_states"
    """The argument with the noisy latents."""
    grid: tuple[int, int, int] | None = None
    """The token grid of packed latents, where no graph can show it."""

    def at(self, share: float) -> dict[str, Any]:
        """The call at a share of the trajectory: 0 is pure noise at the highest timestep, 1 the end."""
        seeded = torch.Generator().manual_seed(7)

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(v) for v in value]
            return (1 - share) * value + share * torch.randn(value.shape, generator=seeded)

        time = self.inputs[self.time]
        later = time * (1 - 0.8 * share)
        return {**self.inputs, self.latents: moved(self.inputs[self.latents]), self.time: later.to(time.dtype)}


Builder = Callable[[], Sample]
ZOO: dict[str, Builder] = {}


def _entry(build: Builder) -> Builder:
    ZOO[build.__name__] = build
    return build


def sample(name: str) -> Sample:
    """The seeded sample of that name; all its weights are random, zero-initialised gates and unit norms among them."""
    torch.manual_seed(0)
    built = ZOO[name]()
    with torch.no_grad():
        for parameter in built.model.parameters():
            flat = parameter.flatten()
            if not bool(torch.isfinite(flat).all()) or bool((flat == flat[0]).all()):
                start = flat[0] if bool(torch.isfinite(flat[0])) and parameter.dim() < 2 else torch.zeros(())
                parameter.copy_(start + 0.2 * torch.randn(parameter.shape))
    built.model.eval().requires_grad_(False)
    return built


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _mask(length: int = TEXT, hidden: int = 2, batch: int = BATCH) -> Tensor:
    """[batch, length], 1 but for the last `hidden` tokens of the last element."""
    mask = torch.ones(batch, length)
    mask[-1, length - hidden :] = 0
    return mask


def _steps(batch: int = BATCH) -> Tensor:
    return torch.full((batch,), 900)


def _shares(batch: int = BATCH) -> Tensor:
    return torch.full((batch,), 0.9)


def _ids(tokens: int, columns: int, width: int = 0) -> Tensor:
    """Positions [tokens, columns]: zeros, or rows and columns of an image of that width."""
    ids = torch.zeros(tokens, columns)
    if width:
        ids[:, 1], ids[:, 2] = torch.arange(tokens) // width, torch.arange(tokens) % width
    return ids


def _rotary(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    angles = _normal(tokens, channels // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


# ------------------------------------------------------------------------------------ two streams, joint attention
def _cogvideox(**options: Any) -> Any:
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 20,
        "text_embed_dim": 24, "num_layers": 3, "sample_width": WIDTH, "sample_height": HEIGHT, "sample_frames": 9,
        "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    return diffusers.CogVideoXTransformer3DModel(**(settings | options))


@_entry
def cogvideox() -> Sample:
    return Sample(
        _cogvideox(use_rotary_positional_embeddings=False),
        {"hidden_states": _normal(BATCH, FRAMES, 4, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 24)},
    )  # fmt: skip


@_entry
def cogvideox_rotary() -> Sample:
    return Sample(
        _cogvideox(),
        {"hidden_states": _normal(BATCH, FRAMES, 4, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 24), "image_rotary_emb": _rotary(prod(GRID), 16)},
    )  # fmt: skip


@_entry
def cogvideox_1_5() -> Sample:
    """Patches of two frames, cut out by a linear layer."""
    return Sample(
        _cogvideox(patch_size_t=2, patch_bias=False, ofs_embed_dim=20, sample_frames=13),
        {"hidden_states": _normal(BATCH, 4, 4, HEIGHT, WIDTH), "timestep": _steps(), "ofs": torch.tensor([2.0]),
         "encoder_hidden_states": _normal(BATCH, TEXT, 24), "image_rotary_emb": _rotary(2 * prod(GRID[1:]), 16)},
    )  # fmt: skip


@_entry
def consisid() -> Sample:
    """CogVideoX with cross-attention to a face in every second layer."""
    return Sample(
        diffusers.ConsisIDTransformer3DModel(
            num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=20,
            text_embed_dim=24, num_layers=4, sample_width=WIDTH, sample_height=HEIGHT, sample_frames=9,
            max_text_seq_length=TEXT, use_rotary_positional_embeddings=True, is_train_face=True,
            cross_attn_interval=2, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=6, LFE_vit_dim=10,
            LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=3, LFE_output_dim=32,
        ),
        {"hidden_states": _normal(BATCH, FRAMES, 4, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 24), "image_rotary_emb": _rotary(prod(GRID), 16),
         "id_cond": _normal(BATCH, 6), "id_vit_hidden": [_normal(BATCH, 4, 10) for _ in range(5)]},
    )  # fmt: skip


def _sd3(**options: Any) -> Sample:
    return Sample(
        diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=20, pooled_projection_dim=12, out_channels=4,
            pos_embed_max_size=24, **options,
        ),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "pooled_projections": _normal(BATCH, 12)},
    )  # fmt: skip


@_entry
def sd3() -> Sample:
    return _sd3()


@_entry
def sd3_5() -> Sample:
    """A second self-attention of the image beside the joint one."""
    return _sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


@_entry
def qwen_image() -> Sample:
    return Sample(
        diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=20, axes_dims_rope=(4, 6, 6),
        ),
        {"hidden_states": _normal(BATCH, 24, 16), "timestep": _shares(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_hidden_states_mask": _mask().long(),
         "img_shapes": [(1, 4, 6)] * BATCH},
        grid=(1, 4, 6),
    )  # fmt: skip


@_entry
def qwen_image_edit() -> Sample:
    """A reference image's tokens behind those of the image, in one stream."""
    built = qwen_image()
    inputs = built.inputs | {
        "hidden_states": _normal(BATCH, 24 + 12, 16),
        "img_shapes": [[(1, 4, 6), (1, 3, 4)]] * BATCH,
    }
    return Sample(built.model, inputs, grid=(1, 1, 36))


@_entry
def cogview3plus() -> Sample:
    size = torch.tensor([[64, 96]] * BATCH)
    return Sample(
        diffusers.CogView3PlusTransformer2DModel(
            patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4, out_channels=4,
            text_embed_dim=20, time_embed_dim=16, condition_dim=4, pos_embed_max_size=16, sample_size=8,
        ),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "original_size": size, "target_size": size,
         "crop_coords": torch.zeros(BATCH, 2, dtype=torch.long)},
    )  # fmt: skip


@_entry
def cogview4() -> Sample:
    size = torch.tensor([[64, 96]] * BATCH)
    return Sample(
        diffusers.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4, out_channels=4,
            text_embed_dim=20, time_embed_dim=16, condition_dim=4,
        ),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "original_size": size, "target_size": size,
         "crop_coords": torch.zeros(BATCH, 2, dtype=torch.long)},
    )  # fmt: skip


@_entry
def mochi() -> Sample:
    return Sample(
        diffusers.MochiTransformer3DModel(
            patch_size=2, num_attention_heads=4, attention_head_dim=8, num_layers=3, pooled_projection_dim=20,
            in_channels=4, qk_norm="rms_norm", text_embed_dim=24, time_embed_dim=12, activation_fn="swiglu",
            max_sequence_length=TEXT,
        ),
        {"hidden_states": _normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 24), "encoder_attention_mask": _mask().bool()},
    )  # fmt: skip


@_entry
def easyanimate() -> Sample:
    return Sample(
        diffusers.EasyAnimateTransformer3DModel(
            attention_head_dim=16, num_attention_heads=2, in_channels=4, mmdit_layers=2, num_layers=4, out_channels=4,
            patch_size=2, sample_height=HEIGHT, sample_width=WIDTH, text_embed_dim=20, time_embed_dim=16,
            time_position_encoding_type="3d_rope", timestep_activation_fn="silu",
        ),
        {"hidden_states": _normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20)},
    )  # fmt: skip


@_entry
def hunyuan_video_15() -> Sample:
    return Sample(
        diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3,
            num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=20, text_embed_2_dim=18,
            image_embed_dim=14, rope_axes_dim=(4, 6, 6), target_size=16,
        ),
        {"hidden_states": _normal(BATCH, 9, FRAMES, 4, 6), "timestep": _steps().float(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_hidden_states_2": _normal(BATCH, 4, 18),
         "encoder_attention_mask": _mask(), "encoder_attention_mask_2": _mask(4, 1),
         "image_embeds": torch.zeros(BATCH, 3, 14)},
    )  # fmt: skip


@_entry
def ltx2() -> Sample:
    """Video and audio, each with its text, attending to each other."""
    return Sample(
        diffusers.LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=3, caption_channels=20,
        ),
        {"hidden_states": _normal(BATCH, prod(GRID), 8), "audio_hidden_states": _normal(BATCH, 5, 4),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "audio_encoder_hidden_states": _normal(BATCH, TEXT, 20),
         "timestep": _steps(), "num_frames": FRAMES, "height": GRID[1], "width": GRID[2], "audio_num_frames": 5,
         "encoder_attention_mask": _mask(), "audio_encoder_attention_mask": _mask()},
        grid=GRID,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- two streams, then one
def _flux_like(kind: str, columns: int = 3, pooled: bool = True, **options: Any) -> Sample:
    settings = {
        "patch_size": 1, "in_channels": 8, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": [4, 4, 8],
    }  # fmt: skip
    if pooled:
        settings["pooled_projection_dim"] = 12
    inputs = {
        "hidden_states": _normal(BATCH, 24, 8), "timestep": _shares(),
        "encoder_hidden_states": _normal(BATCH, TEXT, 20), "img_ids": _ids(24, columns, 6), "txt_ids": _ids(TEXT, columns),
    }  # fmt: skip
    if pooled:
        inputs["pooled_projections"] = _normal(BATCH, 12)
    if options.get("guidance_embeds"):
        inputs["guidance"] = torch.tensor([3.5] * BATCH)
    return Sample(getattr(diffusers, kind)(**(settings | options)), inputs, grid=(1, 4, 6))


@_entry
def flux() -> Sample:
    return _flux_like("FluxTransformer2DModel", guidance_embeds=True)


@_entry
def flux2() -> Sample:
    return _flux_like(
        "Flux2Transformer2DModel", columns=4, pooled=False, guidance_embeds=True, axes_dims_rope=[4, 4, 4, 4],
        timestep_guidance_channels=16,
    )  # fmt: skip


@_entry
def chroma() -> Sample:
    return _flux_like(
        "ChromaTransformer2DModel", pooled=False, approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=2,
    )  # fmt: skip


@_entry
def bria() -> Sample:
    built = _flux_like("BriaTransformer2DModel", pooled=False, pooled_projection_dim=None)
    return Sample(built.model, built.inputs | {"timestep": _steps().float()}, grid=built.grid)


@_entry
def ovis_image() -> Sample:
    return _flux_like("OvisImageTransformer2DModel", pooled=False, out_channels=8)


@_entry
def longcat_image() -> Sample:
    return _flux_like("LongCatImageTransformer2DModel", pooled=False)


@_entry
def auraflow() -> Sample:
    return Sample(
        diffusers.AuraFlowTransformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=3,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=20,
            out_channels=4, pos_embed_max_size=64,
        ),
        {"hidden_states": _normal(BATCH, 4, 8, 8), "timestep": _shares(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20)},
    )  # fmt: skip


@_entry
def hunyuan_video() -> Sample:
    return Sample(
        diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=3, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=20, pooled_projection_dim=12, rope_axes_dim=(4, 6, 6),
        ),
        {"hidden_states": _normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, 11, 20), "pooled_projections": _normal(BATCH, 12),
         "encoder_attention_mask": _mask(11, 3), "guidance": torch.tensor([6000.0] * BATCH)},
    )  # fmt: skip


@_entry
def hunyuan_image() -> Sample:
    return Sample(
        diffusers.HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=3, num_refiner_layers=1, patch_size=(2, 2), text_embed_dim=20, rope_axes_dim=(8, 8),
        ),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _steps().float(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_attention_mask": _mask()},
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- one stream
@_entry
def lumina_next() -> Sample:
    return Sample(
        diffusers.LuminaNextDiT2DModel(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=4,
            num_kv_heads=2, multiple_of=16, learn_sigma=False, cross_attention_dim=20,
        ),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _shares(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_mask": _mask(),
         "image_rotary_emb": embeddings.get_2d_rotary_pos_embed_lumina(8, 16, 16), "cross_attention_kwargs": {}},
    )  # fmt: skip


@_entry
def lumina2() -> Sample:
    return Sample(
        diffusers.Lumina2Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(30, 16, 16),
            cap_feat_dim=20,
        ),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _shares(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_attention_mask": torch.ones(BATCH, TEXT).bool()},
    )  # fmt: skip


@_entry
def z_image() -> Sample:
    return Sample(
        diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=3, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=20, axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
        ),
        {"x": [_normal(4, 1, HEIGHT, WIDTH)], "t": _shares(1), "cap_feats": [_normal(TEXT, 20)]},
        time="t",
        latents="x",
    )  # fmt: skip


@_entry
def omnigen() -> Sample:
    tokens = TEXT + 1 + HEIGHT * WIDTH // 4
    return Sample(
        diffusers.OmniGenTransformer2DModel(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=40, num_layers=3,
            pad_token_id=0, vocab_size=100, in_channels=4, time_step_dim=16,
            rope_scaling={"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
        ),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _shares(),
         "input_ids": torch.randint(1, 100, (BATCH, TEXT)), "input_img_latents": [], "input_image_sizes": {},
         "attention_mask": torch.ones(BATCH, tokens, tokens), "position_ids": torch.arange(tokens).repeat(BATCH, 1)},
    )  # fmt: skip


@_entry
def ernie_image() -> Sample:
    return Sample(
        diffusers.ErnieImageTransformer2DModel(
            hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=40, in_channels=4, out_channels=4,
            patch_size=1, text_in_dim=20, rope_axes_dim=(4, 6, 6),
        ),
        {"hidden_states": _normal(BATCH, 4, 4, 6), "timestep": _steps(), "text_bth": _normal(BATCH, TEXT, 20),
         "text_lens": torch.tensor([TEXT, TEXT - 2])},
    )  # fmt: skip


@_entry
def dit() -> Sample:
    return Sample(
        diffusers.DiTTransformer2DModel(
            in_channels=4, out_channels=8, num_attention_heads=4, attention_head_dim=8, num_layers=3,
            num_embeds_ada_norm=8, sample_size=8,
        ),
        {"hidden_states": _normal(BATCH, 4, 8, 8), "timestep": _steps(), "class_labels": torch.tensor([3, 5])},
    )  # fmt: skip


@_entry
def prx() -> Sample:
    """Queries of the image alone; text only as keys and values."""
    return Sample(
        diffusers.PRXTransformer2DModel(
            in_channels=4, patch_size=2, context_in_dim=20, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3,
            axes_dim=[8, 8],
        ),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _shares(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "attention_mask": _mask().bool()},
    )  # fmt: skip


@_entry
def hunyuan_dit() -> Sample:
    """Long skip connections: the second half of the layers reads the first's."""
    return Sample(
        diffusers.HunyuanDiT2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
            cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=10, hidden_size=32, text_len=5,
            text_len_t5=6, activation_fn="gelu-approximate",
        ),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _steps().float(),
         "encoder_hidden_states": _normal(BATCH, 5, 12), "text_embedding_mask": torch.ones(BATCH, 5),
         "encoder_hidden_states_t5": _normal(BATCH, 6, 16), "text_embedding_mask_t5": torch.ones(BATCH, 6),
         "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * BATCH),
         "style": torch.zeros(BATCH, dtype=torch.long), "image_rotary_emb": _rotary(24, 8)},
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- cross-attention
def _wan(kind: str = "WanTransformer3DModel", **options: Any) -> Any:
    settings = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 18, "freq_dim": 32, "ffn_dim": 40, "num_layers": 3, "rope_max_seq_len": 32,
    }  # fmt: skip
    return getattr(diffusers, kind)(**(settings | options))


def _wan_inputs(channels: int = 4, text: int = TEXT, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": _normal(BATCH, channels, FRAMES, HEIGHT, WIDTH), "timestep": _steps(),
        "encoder_hidden_states": _normal(BATCH, text, 18), **more,
    }  # fmt: skip


@_entry
def wan() -> Sample:
    return Sample(_wan(), _wan_inputs())


@_entry
def wan_i2v() -> Sample:
    """A second cross-attention, to an image; the text must be 512 tokens long."""
    model = _wan(in_channels=12, image_dim=14, added_kv_proj_dim=24)
    return Sample(model, _wan_inputs(12, 512, encoder_hidden_states_image=_normal(BATCH, 9, 14)))


@_entry
def wan_per_token() -> Sample:
    """A timestep of its own for each token; those of the first frame are clean."""
    time = torch.full((BATCH, prod(GRID)), 900)
    time[:, : prod(GRID[1:])] = 0
    return Sample(_wan(), _wan_inputs() | {"timestep": time})


@_entry
def wan_vace() -> Sample:
    """A second stack of layers on a control video, added to the first stack between its layers."""
    model = _wan("WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=6)
    control = {
        "control_hidden_states": _normal(BATCH, 6, FRAMES, HEIGHT, WIDTH),
        "control_hidden_states_scale": torch.ones(2),
    }
    return Sample(model, _wan_inputs() | control)


@_entry
def chronoedit() -> Sample:
    return Sample(_wan("ChronoEditTransformer3DModel"), _wan_inputs())


@_entry
def skyreels_v2() -> Sample:
    """A timestep for each frame."""
    model = _wan("SkyReelsV2Transformer3DModel", inject_sample_info=True)
    inputs = _wan_inputs() | {"timestep": torch.tensor([[100, 500, 900]] * BATCH), "fps": torch.tensor([0])}
    return Sample(model, inputs | {"enable_diffusion_forcing": True})


@_entry
def ltx() -> Sample:
    return Sample(
        diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            num_layers=3, caption_channels=20,
        ),
        {"hidden_states": _normal(BATCH, prod(GRID), 8), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_attention_mask": _mask(), "num_frames": FRAMES,
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


@_entry
def pixart() -> Sample:
    return Sample(
        _pixart("PixArtTransformer2DModel", num_layers=3, use_additional_conditions=False),
        {"hidden_states": _normal(BATCH, 4, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_attention_mask": _mask(),
         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    )  # fmt: skip


@_entry
def latte() -> Sample:
    """Attention over space and over time in turns: the frames move into the batch and back."""
    return Sample(
        _pixart("LatteTransformer3DModel", num_layers=3, video_length=FRAMES),
        {"hidden_states": _normal(BATCH, 4, FRAMES, 8, 8), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20)},
    )  # fmt: skip


@_entry
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
        {"hidden_states": _normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_attention_mask": _mask(),
         "attention_mask": torch.ones(BATCH, FRAMES, HEIGHT, WIDTH),
         "image_rotary_emb": (tuple(angles), tuple(p[None].contiguous() for p in places))},
    )  # fmt: skip


@_entry
def cosmos() -> Sample:
    _without_torchvision()
    return Sample(
        diffusers.CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3, mlp_ratio=2,
            text_embed_dim=20, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        ),
        {"hidden_states": _normal(1, 4, FRAMES, HEIGHT, WIDTH), "timestep": _steps(1),
         "encoder_hidden_states": _normal(1, TEXT, 20), "attention_mask": torch.ones(1, TEXT), "fps": 30,
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


@_entry
def kandinsky5() -> Sample:
    return Sample(
        diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, in_text_dim=20, in_text_dim2=12, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
            model_dim=32, ff_dim=40, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
        ),
        {"hidden_states": _normal(1, FRAMES, HEIGHT, WIDTH, 4), "timestep": _steps(1).float(),
         "encoder_hidden_states": _normal(1, TEXT, 20), "pooled_projections": _normal(1, 12),
         "visual_rope_pos": [torch.arange(n) for n in GRID], "text_rope_pos": torch.arange(TEXT)},
    )  # fmt: skip


@_entry
def sana() -> Sample:
    """Linear attention, and an FFN with convolutions over neighbours."""
    return Sample(
        diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=20,
            sample_size=8,
        ),
        {"hidden_states": _normal(BATCH, 4, 4, 6), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_attention_mask": _mask()},
    )  # fmt: skip


@_entry
def sana_video() -> Sample:
    return Sample(
        diffusers.SanaVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=20,
            sample_size=8,
        ),
        {"hidden_states": _normal(BATCH, 4, FRAMES, HEIGHT, WIDTH), "timestep": _steps(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "encoder_attention_mask": _mask()},
    )  # fmt: skip


@_entry
def stable_audio() -> Sample:
    return Sample(
        diffusers.StableAudioDiTModel(
            sample_size=24, in_channels=6, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            num_key_value_attention_heads=1, out_channels=6, cross_attention_dim=16, time_proj_dim=8,
            global_states_input_dim=12, cross_attention_input_dim=20,
        ),
        {"hidden_states": _normal(BATCH, 6, 24), "timestep": _shares(),
         "encoder_hidden_states": _normal(BATCH, TEXT, 20), "global_hidden_states": _normal(BATCH, 1, 12),
         "rotary_embedding": embeddings.get_1d_rotary_pos_embed(8, 25, use_real=True, repeat_interleave_real=False)},
        grid=(1, 1, 24),
    )  # fmt: skip
