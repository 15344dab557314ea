"""Tiny `DiffusionPipeline`s of diffusers with random weights: real classes, real schedulers and autoencoders.

Text encoders are left out: calls pass `prompt_embeds`. The transformers are those of `examples/_zoo`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from hero_fx.backends import Backend
from hero_fx.policy import Policy

from .examples import example
from .tiny import randomized

__all__ = ["PIPELINES", "Case", "Variants", "latents_of", "modular_wan"]

zoo = example("_zoo")

STEPS = 8
TEXT, NEGATIVE = 7, 5
"""Tokens of the prompt and, where a pipeline allows another length, of the negative prompt."""
_STILL = {"latents_mean": [0.1] * 4, "latents_std": [0.9] * 4}


@dataclass
class Case:
    """A pipeline and one call of it."""

    pipe: Any
    call: dict[str, Any]
    lanes: int = 1
    """Calls of the transformer per step."""
    graphs: int = 1
    """How many shapes these calls have: each compiles once."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the backend that the graph does not show."""
    decoded: tuple[int, ...] = ()
    """Shape of the decoded result."""

    def run(self, seed: int = 5, **more: Any) -> Any:
        """The pipeline's output."""
        generator = torch.Generator().manual_seed(seed)
        settings = {"generator": generator, "num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        return self.pipe(**{**self.call, **settings, **more})[0]


Builder = Callable[[], Case]
PIPELINES: dict[str, Builder] = {}


def _entry(build: Builder) -> Builder:
    PIPELINES[build.__name__] = build
    return build


def latents_of(case: Case, **more: Any) -> list[Tensor]:
    """The latents after every step of a run."""
    seen: list[Tensor] = []

    def keep(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    case.run(callback_on_step_end=keep, **more)
    return seen


class Variants:
    """A backend that makes of each graph what several backends make of it, and runs the variant named by `now`.

    The model is traced once: "plain" is the graph as it is, and all others share what "hero" found in it.
    """

    def __init__(self, hero: Backend, **others: Backend) -> None:
        self.hero, self.others = hero, others
        self.now = "plain"

    def __call__(self, gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        runs: dict[str, Callable[..., Any]] = {"plain": gm.forward, "hero": self.hero(gm, inputs)}
        steps, timestep = self.hero.graphs[-1], self.hero.steppers[-1].inputs.timestep
        for name, backend in self.others.items():
            policy = backend.config.make_policy()
            assert isinstance(policy, Policy)
            rewritten = backend.rewrite(steps)
            assert not rewritten.fallbacks
            runs[name] = backend._compile(gm, inputs, backend.config, policy, rewritten, timestep)
        return lambda *args: runs[self.now](*args)


def _pipe(kind: str, **parts: Any) -> Any:
    """A pipeline without text encoders, silent, its autoencoder in eval mode."""
    pipe = getattr(diffusers, kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.eval().requires_grad_(False)
    return pipe


def _transformer(name: str, **options: Any) -> Any:
    """The transformer of that name of the zoo with two layers, or with other options."""
    model = zoo.sample(name).model
    layers = {"num_layers": 1, "num_single_layers": 1} if "num_single_layers" in model.config else {"num_layers": 2}
    torch.manual_seed(0)
    return randomized(type(model).from_config({**model.config, **layers, **options}))


def _embeds(width: int, *, text: int = TEXT, negative: int = TEXT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        "prompt_embeds": torch.randn(1, text, width, generator=generator),
        "negative_prompt_embeds": torch.randn(1, negative, width, generator=generator),
    }


def _pooled(width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(12)
    return {
        "pooled_prompt_embeds": torch.randn(1, width, generator=generator),
        "negative_pooled_prompt_embeds": torch.randn(1, width, generator=generator),
    }


def _image(height: int, width: int) -> Tensor:
    """[1, 3, height, width] in 0..1."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(13))


def _video(frames: int = 9, height: int = 32, width: int = 48) -> dict[str, int]:
    return {"num_frames": frames, "height": height, "width": width}


def _nothing(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


_T5 = ("tokenizer", "text_encoder")


def _cogvideox_parts() -> dict[str, Any]:
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return {**_nothing(*_T5), "vae": vae, "scheduler": diffusers.CogVideoXDDIMScheduler()}


@_entry
def cogvideox_t2v() -> Case:
    """Guidance in one batch."""
    pipe = _pipe("CogVideoXPipeline", transformer=_transformer("cogvideox_rotary"), **_cogvideox_parts())
    return Case(pipe, {**_embeds(24), **_video()}, decoded=(1, 9, 3, 32, 48))


@_entry
def cogvideox_i2v() -> Case:
    """The image's latents are concatenated on channels."""
    transformer = _transformer("cogvideox_rotary", in_channels=8)
    pipe = _pipe("CogVideoXImageToVideoPipeline", transformer=transformer, **_cogvideox_parts())
    call = {"image": _image(32, 48), **_embeds(24), **_video()}
    return Case(pipe, call, decoded=(1, 9, 3, 32, 48))


def _wan_parts() -> dict[str, Any]:
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **_STILL)
    return {**_nothing(*_T5), "vae": vae, "scheduler": diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)}  # fmt: skip


@_entry
def wan_t2v() -> Case:
    """Two calls a step, their texts of different lengths, named and numbered by `cache_context`."""
    pipe = _pipe("WanPipeline", transformer=_transformer("wan"), **_wan_parts())
    call = {**_embeds(18, negative=NEGATIVE), **_video()}
    return Case(pipe, call, lanes=2, graphs=2, decoded=(1, 9, 3, 32, 48))


def modular_wan() -> tuple[Any, dict[str, Any]]:
    """A modular pipeline, and a call of it: a guider calls the transformer twice a step, and names nothing."""
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    pipe.update_components(transformer=_transformer("wan"), scheduler=_wan_parts()["scheduler"], guider=guider)
    latents = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(5))
    return pipe, {**_embeds(18), "latents": latents, "num_inference_steps": STEPS, "output": "latents"}


@_entry
def wan_i2v() -> Case:
    """Two calls a step of one shape: two named lanes of one graph."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=14, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=6,
    )  # fmt: skip
    encoder: Any = CLIPVisionModel(config)
    encoder.eval().requires_grad_(False)
    pipe = _pipe(
        "WanImageToVideoPipeline", transformer=_transformer("wan_i2v"), image_encoder=encoder,
        image_processor=_clip_processor(), **_wan_parts(),
    )  # fmt: skip
    call = {"image": _image(32, 48), **_embeds(18, text=512, negative=512), **_video()}
    return Case(pipe, call, lanes=2, decoded=(1, 9, 3, 32, 48))


@_entry
def wan_ti2v() -> Case:
    """A timestep for each token: those of the given frame stand still."""
    empty = _nothing("image_encoder", "image_processor")
    pipe = _pipe(
        "WanImageToVideoPipeline", transformer=_transformer("wan"), expand_timesteps=True, **empty, **_wan_parts()
    )
    return Case(pipe, {"image": _image(32, 48), **_embeds(18), **_video()}, lanes=2, decoded=(1, 9, 3, 32, 48))


@_entry
def wan_two_experts() -> Case:
    """Wan 2.2: a second transformer takes over at a timestep."""
    pipe = _pipe(
        "WanPipeline", transformer=_transformer("wan"), transformer_2=_transformer("wan", ffn_dim=44),
        boundary_ratio=0.875, **_wan_parts(),
    )  # fmt: skip
    return Case(pipe, {**_embeds(18), **_video()}, lanes=2, decoded=(1, 9, 3, 32, 48))


def _clip_processor() -> Any:
    """Resizes to 12 x 12; the processor that needs no torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, do_rescale=False)


@_entry
def hunyuan_video() -> Case:
    """Distilled guidance and true guidance, texts of different lengths with masks."""
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        mid_block_add_attention=False,
    )  # fmt: skip
    empty = _nothing(*_T5, "text_encoder_2", "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = _pipe(
        "HunyuanVideoPipeline", transformer=_transformer("hunyuan_video"), vae=vae, scheduler=scheduler, **empty
    )
    masks = {"prompt_attention_mask": _mask(11, 3), "negative_prompt_attention_mask": _mask(9, 2)}
    call = {**_embeds(20, text=11, negative=9), **_pooled(12), **masks, **_video(), "true_cfg_scale": 2.0}
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


@_entry
def flux() -> Case:
    """Packed latents; two calls a step of one shape."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = _pipe(
        "FluxPipeline", transformer=_transformer("flux"), vae=_image_vae(2), scheduler=scheduler, **_nothing(*_CLIPS)
    )
    call = {**_embeds(20), **_pooled(12), "height": 16, "width": 24, "true_cfg_scale": 2.0}
    return Case(pipe, call, lanes=2, options={"grid": (1, 4, 6)}, decoded=(1, 3, 16, 24))


@_entry
def sd3() -> Case:
    """Guidance in one batch; no `cache_context`."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    empty = _nothing(*_CLIPS, "text_encoder_3", "tokenizer_3")
    pipe = _pipe(
        "StableDiffusion3Pipeline", transformer=_transformer("sd3"), vae=_image_vae(4), scheduler=scheduler, **empty
    )
    return Case(pipe, {**_embeds(20), **_pooled(12), "height": 16, "width": 24}, decoded=(1, 3, 16, 24))


@_entry
def qwen_image() -> Case:
    """Two calls a step, texts of different lengths."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True], **_STILL
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = _pipe(
        "QwenImagePipeline", transformer=_transformer("qwen_image"), vae=vae, scheduler=scheduler, **_nothing(*_T5)
    )
    masks = {"prompt_embeds_mask": _mask(TEXT, 2).long(), "negative_prompt_embeds_mask": _mask(NEGATIVE, 1).long()}
    call = {**_embeds(20, negative=NEGATIVE), **masks, "height": 32, "width": 48, "true_cfg_scale": 2.0}
    return Case(pipe, call, lanes=2, graphs=2, options={"grid": (1, 4, 6)}, decoded=(1, 3, 32, 48))


@_entry
def ltx() -> Case:
    """Packed latents of a video, guidance in one batch, a mask on the text."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = _pipe("LTXPipeline", transformer=_transformer("ltx"), vae=vae, scheduler=scheduler, **_nothing(*_T5))
    masks = {"prompt_attention_mask": _mask(TEXT, 2), "negative_prompt_attention_mask": _mask(TEXT, 0)}
    call = {**_embeds(20), **masks, **_video(9, 32, 64)}
    return Case(pipe, call, options={"grid": (2, 4, 8)}, decoded=(1, 9, 3, 32, 64))


class Unguarded:
    """In place of Cosmos' safety checker, which needs weights: finds everything safe."""

    def to(self, device: Any) -> Unguarded:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


@_entry
def cosmos() -> Case:
    """Two calls a step without `cache_context`, texts of different lengths."""
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4, latents_mean=None, latents_std=None,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    pipe = _pipe(
        "CosmosTextToWorldPipeline", transformer=_transformer("cosmos"), vae=vae, scheduler=scheduler,
        safety_checker=Unguarded(), **_nothing(*_T5),
    )  # fmt: skip
    call = {**_embeds(20, negative=NEGATIVE), **_video()}
    return Case(pipe, call, lanes=2, graphs=2, decoded=(1, 9, 3, 32, 48))
