"""A small world model imagines clips with plain torch.compile, with HERO and with a calibrated plan: a table and pictures.

    python examples/quickstart.py

The model in `examples/world/` has Aether's layout at a size for a CPU: a CogVideoX transformer that denoises RGB, disparity
and camera rays together. Given the first and the last frame of scenes it has never seen, it imagines the frames between,
their depth and the camera's path (planning: 50 DDIM steps, classifier-free guidance as a batch of two). The plan in
`examples/world/plans/` was learned by `hero_fx.calibrate` on training scenes. Each way of running the model has a process of
its own. They compile beside each other, which is most of the wait, and then take turns, so that whatever else the machine
does slows all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import hero_fx
from _quickstart_pictures import animate, picture
from _quickstart_ways import Apart, Here, Outcome, Runner, Settings, clips_of, load
from world.calibrate import PLANS
from world.evaluate import errors
from world.latents import MODALITIES
from world.model import TASKS
from world.pipeline import GUIDANCE, STEPS, WEIGHTS
from world.render import Clips


def column(of: Outcome, plain: Outcome, whole: hero_fx.Flops, clips: Clips) -> dict[str, str]:
    """The table's column for one way of running the model; `whole`: FLOPs of the model itself."""
    spent = of.spent or whole
    found = {
        "full + cached steps": of.counted,
        "seconds per full step (median)": f"{of.by_kind[None]:.3f}",
        "seconds per cached step (median)": f"{of.by_kind[0]:.3f}" if 0 in of.by_kind else "",
        "seconds per trajectory (median)": f"{of.seconds:.1f}",
        "speed-up of the trajectory": f"{plain.seconds / of.seconds:.2f}",
        "speed-up by the medians of steps": f"{plain.of_medians / of.of_medians:.2f}",
        "speed-up that the FLOPs with attention allow": f"{whole.total / spent.total:.2f}",
        "GEMM TFLOPs": f"{spent.gemm / 1e12:.3f}",
        "feature state, MB": f"{of.state_bytes / 1e6:.1f}",
    }
    for name, channels in MODALITIES.items():
        true, ours = (way.output.latents[:, :, channels] for way in (plain, of))
        found[f"{name}: relative L2 to full compute"] = f"{float((ours - true).norm() / true.norm()):.4f}"
    difference = (of.output.rgb - plain.output.rgb).square().mean()
    found["rgb: PSNR to full compute, dB"] = "" if of is plain else f"{float(-10 * difference.log10()):.1f}"
    return found | {f"to the truth: {name}": f"{error:.3f}" for name, error in errors(of.output, clips).items()}


def report(outcomes: Mapping[str, Outcome], clips: Clips) -> str:
    """The table; the first of the outcomes is of plain `torch.compile`."""
    plain = next(iter(outcomes.values()))
    whole = next(of.whole for of in outcomes.values() if of.whole is not None)
    columns = [column(of, plain, whole, clips) for of in outcomes.values()]
    rows = [[name, *(of[name] for of in columns)] for name in columns[0]]
    return tabulate(rows, headers=["", *outcomes], disable_numparse=True, stralign="right")


def ways_of(arguments: argparse.Namespace, settings: Settings) -> list[Here | Apart]:
    """The model compiled in every way that is compared."""
    options: dict[str, dict[str, Any] | None] = {
        "torch.compile": None,
        "HERO": {"interval": arguments.interval, "num_steps": settings.steps},
    }
    shipped = settings.weights == WEIGHTS and settings.steps == STEPS[settings.task]
    path = arguments.plan or (PLANS / f"{settings.task}.safetensors" if shipped else None)
    if path is None:
        print(f"no plan: the shipped ones are for the shipped weights and {STEPS[settings.task]} steps; see --plan")
    else:
        options["plan"] = {"plan": path}
    together = arguments.one_process or settings.inner == "eager"  # nothing to compile
    return [(Here if together else Apart)(name, settings, of_way) for name, of_way in options.items()]


def first_calls(ways: list[Here | Apart]) -> None:
    """Lets all ways compile, beside each other where they have processes of their own."""
    print(f"compiling {', '.join(way.name for way in ways)} ...", flush=True)
    with tqdm(total=len(ways), desc="compiled") as bar:
        waited: dict[Future[float], str] = {way.ask(Runner.first_call): way.name for way in ways}
        while waited:
            done, _ = wait(waited, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                bar.write(f"{waited.pop(future)}: first call took {future.result():.0f} s")
            bar.update(len(done))
            bar.refresh()  # the clock


def main(argv: list[str] | None = None) -> None:
    """Compiles all ways, denoises in turns, prints the table, saves the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="planning", choices=TASKS)
    parser.add_argument("--steps", type=int, help="50 for planning, 30 for reconstruction if not given")
    parser.add_argument("--interval", type=int, default=2, help="N: a full step every N steps")
    parser.add_argument("--scenes", type=int, default=3, help="denoised as one batch; the pictures show three")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turns; several for figures to rely on")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--one-process", action="store_true", help="compile one way after the other, in less memory")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a saved pipeline")
    parser.add_argument("--plan", type=Path, help="a calibrated plan; the shipped one for shipped weights if not given")
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"), help="the animation is saved beside it")
    arguments = parser.parse_args(argv)
    for name in ("steps", "interval", "scenes", "rounds"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            parser.error(f"--{name} {given}: at least 1")
    torch.set_grad_enabled(False)
    task, steps = arguments.task, arguments.steps or STEPS[arguments.task]
    clips = clips_of(arguments.scenes)
    config = load(arguments.weights).transformer.config
    print(
        f"{config.num_layers} layers of width {config.num_attention_heads * config.attention_head_dim}, {task} of "
        f"{arguments.scenes} scenes, guidance {GUIDANCE[task]}, {steps} DDIM steps, {torch.get_num_threads()} threads"
    )
    ways = ways_of(arguments, Settings(arguments.weights, task, steps, arguments.scenes, arguments.inner))
    try:
        first_calls(ways)
        for way in arguments.rounds * ways:
            way.ask(Runner.denoise).result()
        outcomes = {way.name: way.ask(Runner.outcome).result() for way in ways}
    finally:
        for way in ways:
            way.close()
    print("\n" + report(outcomes, clips))
    worlds = {"truth": clips, **{name: of.output for name, of in outcomes.items()}}
    frames = clips.rgb.shape[1]
    picture(worlds, arguments.picture, given=(0, frames - 1) if task == "planning" else range(frames))
    animation = arguments.picture.with_suffix(".gif")
    animate(worlds, animation)
    print(f"\nframes side by side: {arguments.picture}\nthe same, moving: {animation}")


if __name__ == "__main__":
    main()
