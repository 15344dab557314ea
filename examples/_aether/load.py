"""The published weights: found, loaded, and put into the authors' pipeline or ours."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)

from .pipeline import AetherPipeline

AETHER_PAGE, BASE_PAGE = "AetherWorldModel/AetherV1", "THUDM/CogVideoX-5b-I2V"
"""Pages on Hugging Face: Aether's transformer, and the model it was trained from, whose other parts it keeps."""
AUTHORS = "aether.pipelines.aetherv1_pipeline_cogvideox"
"""Module of the authors' pipeline (GitHub: InternRobotics/Aether)."""
SCHEDULERS = {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}


class Missing(RuntimeError):
    """Weights, data or a package are not here; the message says where to get them."""


def folder_of(part: str, weights: Path, base: Path | None) -> Path:
    """The folder of a part of the pipeline: below `weights`, or else below `base`.

    Raises:
        Missing: it is in neither.
    """
    for root in (weights, base):
        if root is not None and (root / part).is_dir() and any((root / part).iterdir()):
            return root / part
    page = AETHER_PAGE if part == "transformer" else BASE_PAGE
    option = "--weights" if part == "transformer" else "--base"
    places = " nor in ".join(str(root) for root in (weights, base) if root is not None)
    raise Missing(
        f"{part}/ is not in {places}: download {page} from Hugging Face (`hf download {page} --local-dir DIR`) and give its "
        f"folder as {option} DIR"
    )


def load(
    weights: Path,
    base: Path | None = None,
    *,
    scheduler: str = "dpm",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    offload: bool = False,
    authors: bool | None = None,
) -> Any:
    """The pipeline, in eval mode, with the text encoder used for the one prompt that there is, the empty one, and freed.

    Args:
        weights: folder with `transformer/`, and perhaps the other parts.
        base: folder with `tokenizer/`, `text_encoder/`, `vae/` and `scheduler/`, where `weights` lacks them.
        scheduler: `"dpm"` (the authors' choice) or `"ddim"`.
        dtype: of weights and latents.
        device: where it runs.
        offload: leave the parts on the CPU; the caller switches offload on when the transformer is compiled.
        authors: True takes the authors' pipeline, False ours, None theirs where it is installed and the dtype is bfloat16,
            the one that it takes.

    Raises:
        Missing: weights or a package are not there.
    """
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    found = {part: folder_of(part, weights, base) for part in parts}
    make = pipeline_class(authors, dtype)
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError as error:
        raise Missing(
            f"the text encoder needs the package transformers ({error}): pip install 'hero-fx[aether]'"
        ) from None
    place = "cpu" if offload else device
    pipe = make(
        tokenizer=AutoTokenizer.from_pretrained(found["tokenizer"]),
        text_encoder=T5EncoderModel.from_pretrained(found["text_encoder"], dtype=dtype).to(place).eval(),
        vae=AutoencoderKLCogVideoX.from_pretrained(found["vae"], torch_dtype=dtype).to(place),
        scheduler=SCHEDULERS[scheduler].from_pretrained(found["scheduler"]),
        transformer=CogVideoXTransformer3DModel.from_pretrained(found["transformer"], torch_dtype=dtype).to(place),
    )
    if isinstance(pipe, AetherPipeline):  # the authors' has it by now
        pipe.encode_empty_prompt()
    pipe.text_encoder = None
    for module in (pipe.transformer, pipe.vae):
        module.eval().requires_grad_(False)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    return pipe


def pipeline_class(authors: bool | None, dtype: torch.dtype) -> Any:
    """The class of the authors' pipeline where it is installed or asked for; else ours.

    Raises:
        Missing: theirs is asked for and not installed.
        ValueError: theirs is asked for in a dtype that it does not take.
    """
    if authors is False or (authors is None and dtype != torch.bfloat16):
        return AetherPipeline
    if dtype != torch.bfloat16:
        raise ValueError(f"dtype={dtype}: the authors' pipeline runs in bfloat16 alone; take bfloat16, or our pipeline")
    try:
        return importlib.import_module(AUTHORS).AetherV1PipelineCogVideoX
    except ImportError as error:
        if authors:
            raise Missing(
                f"the authors' pipeline cannot be imported ({error}): clone InternRobotics/Aether from GitHub and put it on "
                "PYTHONPATH, or leave out --pipeline authors to take ours"
            ) from error
        return AetherPipeline
