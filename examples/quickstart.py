"""A small world model imagines clips with plain torch.compile, with HERO and with a calibrated plan: a table and pictures.

    python examples/quickstart.py

The model in `examples/world/` has Aether's layout at a size for a CPU: a CogVideoX transformer that denoises RGB, disparity
and camera rays together. Given the first and the last frame of scenes it has never seen, it imagines the frames between,
their depth and the camera's path (planning: 50 DDIM steps, classifier-free guidance as a batch of two). The plan in
`examples/world/plans/` was learned by `hero_fx.calibrate` on training scenes. The ways of running the model take turns, so
that whatever else the machine does slows all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import hero_fx
from _quickstart_pictures import animate, picture
from _systems import System, compiled_with, plain_system
from world.calibrate import PLANS
from world.evaluate import errors
from world.latents import MODALITIES
from world.model import TASKS
from world.pipeline import GUIDANCE, STEPS, WEIGHTS, WorldModelPipeline
from world.render import Clips, render
from world.scenes import HELD_OUT, sample_scenes


def run(pipe: WorldModelPipeline, system: System, clips: Clips, task: str, steps: int, bar: Any = None) -> list[float]:
    """Denoises once from the noise of seed 0; the seconds of each step."""
    marks = [time.perf_counter()]

    def mark(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.append(time.perf_counter())
        if bar is not None:
            bar.update()
        return tensors

    pipe.transformer = system.transformer
    generator = torch.Generator().manual_seed(0)
    system.output = pipe(clips.rgb, task, steps, generator=generator, callback_on_step_end=mark)
    return [after - before for before, after in pairwise(marks)]


def column(system: System, plain: System, graphs: hero_fx.StepGraphs, clips: Clips, num_steps: int) -> dict[str, str]:
    """The table's column for one way of running the model; `graphs`: of any backend, whose `normal` is the model itself."""
    kinds = system.kinds(num_steps)
    seconds = system.by_kind(num_steps)
    plain_s = median(s for of_run in plain.seconds for s in of_run)
    whole = hero_fx.flops(graphs.normal) * num_steps
    spent = system.flops(num_steps, graphs.normal)
    state = 0 if system.backend is None else system.backend.stats().state_bytes
    found = {
        "full + cached steps": system.counted(num_steps),
        "seconds per full step (median)": f"{seconds[None]:.3f}",
        "seconds per cached step (median)": f"{seconds[0]:.3f}" if 0 in seconds else "",
        "seconds per trajectory (median)": f"{system.total():.1f}",
        "speed-up of the trajectory": f"{plain.total() / system.total():.2f}",
        "speed-up by the medians of steps": f"{num_steps * plain_s / sum(seconds[kind] for kind in kinds):.2f}",
        "speed-up that the FLOPs with attention allow": f"{whole.total / spent.total:.2f}",
        "GEMM TFLOPs": f"{spent.gemm / 1e12:.3f}",
        "feature state, MB": f"{state / 1e6:.1f}",
    }
    for name, channels in MODALITIES.items():
        true, ours = (of.output.latents[:, :, channels] for of in (plain, system))
        found[f"{name}: relative L2 to full compute"] = f"{float((ours - true).norm() / true.norm()):.4f}"
    difference = (system.output.rgb - plain.output.rgb).square().mean()
    found["rgb: PSNR to full compute, dB"] = "" if system is plain else f"{float(-10 * difference.log10()):.1f}"
    return found | {f"to the truth: {name}": f"{error:.3f}" for name, error in errors(system.output, clips).items()}


def report(systems: Sequence[System], clips: Clips, num_steps: int) -> str:
    """The table."""
    graphs = next(system.backend.graphs[-1] for system in systems if system.backend is not None)
    columns = [column(system, systems[0], graphs, clips, num_steps) for system in systems]
    rows = [[name, *(of[name] for of in columns)] for name in columns[0]]
    return tabulate(rows, headers=["", *(s.name for s in systems)], disable_numparse=True, stralign="right")


def compiled(model: Any, arguments: argparse.Namespace, task: str, steps: int) -> tuple[System, ...]:
    """The model compiled in every way that is compared."""

    model_of = partial(compiled_with, model, inner=arguments.inner)
    full, hero = plain_system(model, arguments.inner), model_of("HERO", interval=arguments.interval, num_steps=steps)
    shipped = arguments.weights == WEIGHTS and steps == STEPS[task]
    path = arguments.plan or (PLANS / f"{task}.safetensors" if shipped else None)
    if path is None:
        print(f"no plan: the shipped ones are for the shipped weights and {STEPS[task]} steps; see --plan")
        return full, hero
    return full, hero, model_of("plan", plan=path)


def main(argv: list[str] | None = None) -> None:
    """Compiles both ways, denoises in turns, prints the table, saves the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="planning", choices=TASKS)
    parser.add_argument("--steps", type=int, help="50 for planning, 30 for reconstruction if not given")
    parser.add_argument("--interval", type=int, default=2, help="N: a full step every N steps")
    parser.add_argument("--scenes", type=int, default=3, help="denoised as one batch; the pictures show three")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turns; several for figures to rely on")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a saved pipeline")
    parser.add_argument("--plan", type=Path, help="a calibrated plan; the shipped one for shipped weights if not given")
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"), help="the animation is saved beside it")
    arguments = parser.parse_args(argv)
    for name in ("steps", "interval", "scenes", "rounds"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            parser.error(f"--{name} {given}: at least 1")
    torch.set_grad_enabled(False)
    task, steps = arguments.task, arguments.steps or STEPS[arguments.task]
    pipe = WorldModelPipeline.from_pretrained(arguments.weights)
    pipe.set_progress_bar_config(disable=True)
    clips = render(sample_scenes(range(HELD_OUT, HELD_OUT + arguments.scenes)))
    config = pipe.transformer.config
    print(
        f"{config.num_layers} layers of width {config.num_attention_heads * config.attention_head_dim}, {task} of "
        f"{arguments.scenes} scenes, guidance {GUIDANCE[task]}, {steps} DDIM steps, {torch.get_num_threads()} threads"
    )
    systems = compiled(pipe.transformer, arguments, task, steps)
    for system in systems:
        print(f"{system.name}: compiling ...", flush=True)
        print(f"{system.name}: first call took {run(pipe, system, clips, task, 1)[0]:.0f} s", flush=True)
    for system in arguments.rounds * systems:
        if system.backend is not None:
            system.backend.reset()
        with tqdm(total=steps, desc=system.name) as bar:
            system.seconds.append(run(pipe, system, clips, task, steps, bar))
    print("\n" + report(systems, clips, steps))
    worlds = {"truth": clips, **{system.name: system.output for system in systems}}
    frames = clips.rgb.shape[1]
    picture(worlds, arguments.picture, given=(0, frames - 1) if task == "planning" else range(frames))
    animation = arguments.picture.with_suffix(".gif")
    animate(worlds, animation)
    print(f"\nframes side by side: {arguments.picture}\nthe same, moving: {animation}")


if __name__ == "__main__":
    main()
