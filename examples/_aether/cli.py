"""The options that `run.py` and `evaluate.py` share, and what they make of them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from .load import SCHEDULERS, load
from .pipeline import BASE_FPS
from .runner import ATTENTION, Runner, Settings

PIPELINES = {"auto": None, "authors": True, "ours": False}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the model, its sampler, and where and how it runs."""
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="folder with transformer/, and perhaps the other parts")
    add("--base", type=Path, help="folder with vae/, text_encoder/, tokenizer/, scheduler/")
    add("--pipeline", default="auto", choices=PIPELINES, help="auto: the authors' where it is installed")
    add("--scheduler", default="dpm", choices=SCHEDULERS)
    add("--seed", type=int, default=42)
    add("--height", type=int, help="480 if not given: what the transformer was made for")
    add("--width", type=int, help="720 if not given")
    add("--frames", type=int, help="of a window; 41 if not given (the authors' pipeline takes 17, 25, 33, 41)")
    add("--fps", type=int, default=BASE_FPS, help="(the authors' pipeline takes 8, 10, 12, 15, 24)")
    add("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    add("--attention", choices=ATTENTION, help="this kernel or an error; PyTorch chooses if not given")
    add("--offload", action="store_true", help="only the part that runs is on the GPU")
    add("--compile-cache", type=Path, help="folder of Inductor's cache, to be kept for the next time")
    add("--dtype", default="bfloat16", choices=DTYPES)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program if options do not go together; tells Inductor where its cache is."""
    if arguments.offload and not arguments.device.startswith("cuda"):
        parser.error(f"--offload moves parts to a GPU: --device {arguments.device} has none")
    if arguments.compile_cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(arguments.compile_cache.absolute())


def pipe_of(arguments: argparse.Namespace) -> Any:
    """The pipeline; sets `size` (height, width) and `frames` where they were left to the transformer.

    Raises:
        Missing: weights or a package are not there.
        ValueError: the authors' pipeline is asked for in a dtype that it does not take.
    """
    pipe = load(
        arguments.weights, arguments.base, scheduler=arguments.scheduler, dtype=DTYPES[arguments.dtype],
        device=arguments.device, offload=arguments.offload, authors=PIPELINES[arguments.pipeline],
    )  # fmt: skip
    config, factor = pipe.transformer.config, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    arguments.size = (
        arguments.height or config.sample_height * factor,
        arguments.width or config.sample_width * factor,
    )
    arguments.frames = arguments.frames or config.sample_frames
    return pipe


def runner_of(pipe: Any, arguments: argparse.Namespace, steps: int, **more: Any) -> Runner:
    """Runs the pipeline with the options' settings."""
    settings = Settings(
        steps=steps, inner=arguments.inner, attention=arguments.attention, offload=arguments.offload,
        device=arguments.device, seed=arguments.seed, **more,
    )  # fmt: skip
    return Runner(pipe, settings)


def fixed_inputs(arguments: argparse.Namespace, task: str, guidance: float) -> dict[str, Any]:
    """What every call of the pipeline for a task is given."""
    height, width = arguments.size
    return {
        "task": task, "height": height, "width": width, "num_frames": arguments.frames, "fps": arguments.fps,
        "guidance_scale": guidance,
    }  # fmt: skip
