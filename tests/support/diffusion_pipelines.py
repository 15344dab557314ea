"""Tiny `DiffusionPipeline`s of diffusers with random weights: real classes, real schedulers and autoencoders.

Text encoders are left out: calls pass `prompt_embeds`. The transformers are those of `examples/_zoo`.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from .pipeline_case import (
    PIPELINES,
    STEPS,
    TEXT,
    Case,
    embeds,
    entry,
    image,
    latents_of,
    nothing,
    pipeline_of,
    pooled,
    transformer_of,
    video,
)

__all__ = ["PIPELINES", "STEPS", "Case", "latents_of", "modular_wan"]

NEGATIVE = 5
"""Tokens of the negative prompt, where a pipeline allows another length than the prompt's."""
_STILL = {"latents_mean": [0.1] * 4, "latents_std": [0.9] * 4}


_T5 = ("tokenizer", "text_encoder")


def _cogvideox_parts() -> dict[str, Any]:
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return {**nothing(*_T5), "vae": vae, "scheduler": diffusers.CogVideoXDDIMScheduler()}


@entry
def cogvideox_t2v() -> Case:
    """Guidance in one batch."""
    pipe = pipeline_of("CogVideoXPipeline", transformer=transformer_of("cogvideox_rotary"), **_cogvideox_parts())
    return Case(pipe, {**embeds(24), **video()}, decoded=(1, 9, 3, 32, 48))


@entry
def cogvideox_i2v() -> Case:
    """The image's latents are concatenated on channels."""
    transformer = transformer_of("cogvideox_rotary", in_channels=8)
    pipe = pipeline_of("CogVideoXImageToVideoPipeline", transformer=transformer, **_cogvideox_parts())
    call = {"image": image(32, 48), **embeds(24), **video()}
    return Case(pipe, call, decoded=(1, 9, 3, 32, 48))


def _wan_parts() -> dict[str, Any]:
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **_STILL)
    return {**nothing(*_T5), "vae": vae, "scheduler": diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)}  # fmt: skip


@entry
def wan_t2v() -> Case:
    """Two calls a step, their texts of different lengths, named and numbered by `cache_context`."""
    pipe = pipeline_of("WanPipeline", transformer=transformer_of("wan"), **_wan_parts())
    call = {**embeds(18, negative=NEGATIVE), **video()}
    return Case(pipe, call, lanes=2, graphs=2, decoded=(1, 9, 3, 32, 48))


def modular_wan() -> tuple[Any, dict[str, Any]]:
    """A modular pipeline, and a call of it: a guider calls the transformer twice a step, and names nothing."""
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    pipe.update_components(transformer=transformer_of("wan"), scheduler=_wan_parts()["scheduler"], guider=guider)
    latents = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(5))
    return pipe, {**embeds(18), "latents": latents, "num_inference_steps": STEPS, "output": "latents"}


@entry
def wan_i2v() -> Case:
    """Two calls a step of one shape: two named lanes of one graph."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=14, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=6,
    )  # fmt: skip
    encoder: Any = CLIPVisionModel(config)
    encoder.eval().requires_grad_(False)
    pipe = pipeline_of(
        "WanImageToVideoPipeline", transformer=transformer_of("wan_i2v"), image_encoder=encoder,
        image_processor=_clip_processor(), **_wan_parts(),
    )  # fmt: skip
    call = {"image": image(32, 48), **embeds(18, text=512, negative=512), **video()}
    return Case(pipe, call, lanes=2, decoded=(1, 9, 3, 32, 48))


@entry
def wan_ti2v() -> Case:
    """A timestep for each token: those of the given frame stand still."""
    empty = nothing("image_encoder", "image_processor")
    pipe = pipeline_of(
        "WanImageToVideoPipeline", transformer=transformer_of("wan"), expand_timesteps=True, **empty, **_wan_parts()
    )
    return Case(pipe, {"image": image(32, 48), **embeds(18), **video()}, lanes=2, decoded=(1, 9, 3, 32, 48))


@entry
def wan_two_experts() -> Case:
    """Wan 2.2: a second transformer takes over at a timestep."""
    pipe = pipeline_of(
        "WanPipeline", transformer=transformer_of("wan"), transformer_2=transformer_of("wan", ffn_dim=44),
        boundary_ratio=0.875, **_wan_parts(),
    )  # fmt: skip
    return Case(pipe, {**embeds(18), **video()}, lanes=2, decoded=(1, 9, 3, 32, 48))


def _clip_processor() -> Any:
    """Resizes to 12 x 12; the processor that needs no torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, do_rescale=False)


@entry
def hunyuan_video() -> Case:
    """Distilled guidance and true guidance, texts of different lengths with masks."""
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        mid_block_add_attention=False,
    )  # fmt: skip
    empty = nothing(*_T5, "text_encoder_2", "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = pipeline_of(
        "HunyuanVideoPipeline", transformer=transformer_of("hunyuan_video"), vae=vae, scheduler=scheduler, **empty
    )
    masks = {"prompt_attention_mask": _mask(11, 3), "negative_prompt_attention_mask": _mask(9, 2)}
    call = {**embeds(20, text=11, negative=9), **pooled(12), **masks, **video(), "true_cfg_scale": 2.0}
    return Case(pipe, call, lanes=2, graphs=2, decoded=(1, 9, 3, 32, 48))


def _mask(length: int, hidden: int) -> Tensor:
    mask = torch.ones(1, length)
    mask[:, length - hidden :] = 0
    return mask


def _image_vae(channels: int) -> Any:
    """Halves height and width."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=2, shift_factor=0.1, scaling_factor=1.2,
    )  # fmt: skip


_CLIPS = (*_T5, "text_encoder_2", "tokenizer_2")


@entry
def flux() -> Case:
    """Packed latents; two calls a step of one shape."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = pipeline_of(
        "FluxPipeline", transformer=transformer_of("flux"), vae=_image_vae(2), scheduler=scheduler, **nothing(*_CLIPS)
    )
    call = {**embeds(20), **pooled(12), "height": 16, "width": 24, "true_cfg_scale": 2.0}
    return Case(pipe, call, lanes=2, options={"grid": (1, 4, 6)}, decoded=(1, 3, 16, 24))


@entry
def sd3() -> Case:
    """Guidance in one batch; no `cache_context`."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    empty = nothing(*_CLIPS, "text_encoder_3", "tokenizer_3")
    pipe = pipeline_of(
        "StableDiffusion3Pipeline", transformer=transformer_of("sd3"), vae=_image_vae(4), scheduler=scheduler, **empty
    )
    return Case(pipe, {**embeds(20), **pooled(12), "height": 16, "width": 24}, decoded=(1, 3, 16, 24))


@entry
def qwen_image() -> Case:
    """Two calls a step, texts of different lengths."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True], **_STILL
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = pipeline_of(
        "QwenImagePipeline", transformer=transformer_of("qwen_image"), vae=vae, scheduler=scheduler, **nothing(*_T5)
    )
    masks = {"prompt_embeds_mask": _mask(TEXT, 2).long(), "negative_prompt_embeds_mask": _mask(NEGATIVE, 1).long()}
    call = {**embeds(20, negative=NEGATIVE), **masks, "height": 32, "width": 48, "true_cfg_scale": 2.0}
    return Case(pipe, call, lanes=2, graphs=2, options={"grid": (1, 4, 6)}, decoded=(1, 3, 32, 48))


@entry
def ltx() -> Case:
    """Packed latents of a video, guidance in one batch, a mask on the text."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = pipeline_of("LTXPipeline", transformer=transformer_of("ltx"), vae=vae, scheduler=scheduler, **nothing(*_T5))
    masks = {"prompt_attention_mask": _mask(TEXT, 2), "negative_prompt_attention_mask": _mask(TEXT, 0)}
    call = {**embeds(20), **masks, **video(9, 32, 64)}
    return Case(pipe, call, options={"grid": (2, 4, 8)}, decoded=(1, 9, 3, 32, 64))


class Unguarded:
    """In place of Cosmos' safety checker, which needs weights: finds everything safe."""

    def to(self, device: Any) -> Unguarded:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


@entry
def cosmos() -> Case:
    """Two calls a step without `cache_context`, texts of different lengths."""
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4, latents_mean=None, latents_std=None,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    pipe = pipeline_of(
        "CosmosTextToWorldPipeline", transformer=transformer_of("cosmos"), vae=vae, scheduler=scheduler,
        safety_checker=Unguarded(), **nothing(*_T5),
    )  # fmt: skip
    call = {**embeds(20, negative=NEGATIVE), **video()}
    return Case(pipe, call, lanes=2, graphs=2, decoded=(1, 9, 3, 32, 48))
