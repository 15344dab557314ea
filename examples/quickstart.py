"""A small world model imagines clips with plain torch.compile and with hero_fx: a table and a picture.

    python examples/quickstart.py

The model in `examples/world/` has Aether's layout at a size for a CPU: a CogVideoX transformer that denoises RGB, disparity
and camera rays together. Given the first and the last frame of scenes it has never seen, it imagines the frames between,
their depth and the camera's path (planning: 50 DDIM steps, classifier-free guidance as a batch of two). The two ways of
running it take turns, so that whatever else the machine does slows both.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import hero_fx
from world.evaluate import errors
from world.latents import MODALITIES
from world.model import TASKS
from world.pipeline import GUIDANCE, STEPS, WEIGHTS, WorldModelPipeline
from world.render import Clips, render
from world.scenes import HELD_OUT, sample_scenes


@dataclass
class System:
    """A compiled transformer, and what its runs took and gave."""

    name: str
    transformer: Any
    seconds: list[list[float]] = field(default_factory=list)
    """Of each step of each run."""
    output: Any = None

    def total(self) -> float:
        """Seconds per trajectory, the median over runs."""
        return median(map(sum, self.seconds))


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


def report(plain: System, fast: System, backend: hero_fx.Backend, clips: Clips, num_steps: int) -> str:
    """The table."""
    steps, config = backend.graphs[-1], backend.config
    policy = config.make_policy()
    assert policy is not None
    kinds = hero_fx.step_kinds(config, policy, num_steps)
    times = [(s, kind) for of_run in fast.seconds for s, kind in zip(of_run, kinds, strict=True)]
    plain_s = median(s for of_run in plain.seconds for s in of_run)
    full_s = median(s for s, kind in times if kind is None)
    cached = [s for s, kind in times if kind is not None]
    cached_s = median(cached) if cached else 0.0
    by_medians = kinds.count(None) * full_s + (num_steps - kinds.count(None)) * cached_s
    flops_plain = hero_fx.flops(steps.normal) * num_steps
    flops_fast = hero_fx.trajectory_flops(steps, config, num_steps)
    rows = [
        ["full + cached steps", f"{num_steps} + 0", f"{kinds.count(None)} + {num_steps - kinds.count(None)}"],
        ["seconds per full step (median)", f"{plain_s:.3f}", f"{full_s:.3f}"],
        ["seconds per cached step (median)", "", f"{cached_s:.3f}" if cached else ""],
        ["seconds per trajectory (median)", f"{plain.total():.1f}", f"{fast.total():.1f}"],
        ["speed-up of the trajectory", "1.00", f"{plain.total() / fast.total():.2f}"],
        ["speed-up by the medians of steps", "1.00", f"{num_steps * plain_s / by_medians:.2f}"],
        ["speed-up that the FLOPs with attention allow", "1.00", f"{flops_plain.total / flops_fast.total:.2f}"],
        ["GEMM TFLOPs", f"{flops_plain.gemm / 1e12:.3f}", f"{flops_fast.gemm / 1e12:.3f}"],
        ["feature state, MB", "0", f"{backend.stats().state_bytes / 1e6:.1f}"],
    ]
    for name, channels in MODALITIES.items():
        full, ours = (system.output.latents[:, :, channels] for system in (plain, fast))
        rows.append([f"{name}: relative L2 to full compute", "0", f"{float((ours - full).norm() / full.norm()):.4f}"])
    psnr = -10 * (fast.output.rgb - plain.output.rgb).square().mean().log10()
    rows.append(["rgb: PSNR to full compute, dB", "", f"{float(psnr):.1f}"])
    truth = [errors(system.output, clips) for system in (plain, fast)]
    rows += [[f"to the truth: {name}", *(f"{of[name]:.3f}" for of in truth)] for name in truth[0]]
    return tabulate(rows, headers=["", plain.name, fast.name], disable_numparse=True, stralign="right")


def picture(plain: System, fast: System, clips: Clips, path: Path) -> None:
    """The first scene, frames side by side: the truth, full compute, hero_fx and their difference, in RGB and disparity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    frames = clips.rgb.shape[1]
    colour = [x[0].permute(0, 2, 3, 1) for x in (clips.rgb, plain.output.rgb, fast.output.rgb)]
    depth = [1 / x[0] for x in (clips.depth, plain.output.depth, fast.output.depth)]
    figure, axes = plt.subplots(8, frames, figsize=(1.5 * frames + 1, 1.36 * 8), layout="compressed")
    for r, (name, images, brightest) in enumerate((("RGB", colour, 1.0), ("disparity", depth, float(depth[0].max())))):
        difference = (images[2] - images[1]).abs()
        difference = difference.mean(dim=-1) if difference.ndim == 4 else difference
        largest = float(difference.max()) or 1.0
        for k, label in enumerate(("truth", plain.name, fast.name, "|difference|")):
            line = axes[4 * r + k]
            line[0].set_ylabel(f"{name}\n{label}", fontsize=8)
            for f in range(frames):
                if k < 3:
                    shown = line[f].imshow(images[k][f].numpy(), cmap="magma", vmin=0, vmax=brightest)
                else:
                    shown = line[f].imshow(difference[f].numpy(), cmap="gray", vmin=0, vmax=largest)
        bar = figure.colorbar(shown, ax=axes[4 * r + 3].tolist(), fraction=0.02)
        bar.set_label(f"of {brightest:.2f}", fontsize=8)
    for f in range(frames):
        axes[0, f].set_title(f"frame {f}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Compiles both ways, denoises in turns, prints the table, saves the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="planning", choices=TASKS)
    parser.add_argument("--steps", type=int, help="50 for planning, 30 for reconstruction if not given")
    parser.add_argument("--interval", type=int, default=2, help="N: a full step every N steps")
    parser.add_argument("--scenes", type=int, default=4, help="denoised as one batch")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a saved pipeline")
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"))
    arguments = parser.parse_args(argv)
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
    backend = hero_fx.backend(interval=arguments.interval, num_steps=steps, inner=arguments.inner)
    model = pipe.transformer
    plain = System("torch.compile", torch.compile(model, backend=arguments.inner, fullgraph=True))
    fast = System("hero_fx", torch.compile(model, backend=backend, fullgraph=True))
    for system in (plain, fast):
        print(f"{system.name}: compiling ...", flush=True)
        print(f"{system.name}: first call took {run(pipe, system, clips, task, 1)[0]:.0f} s", flush=True)
    for system in arguments.rounds * (plain, fast):
        hero_fx.reset()
        with tqdm(total=steps, desc=system.name) as bar:
            system.seconds.append(run(pipe, system, clips, task, steps, bar))
    print("\n" + report(plain, fast, backend, clips, steps))
    picture(plain, fast, clips, arguments.picture)
    print(f"\nframes side by side: {arguments.picture}")


if __name__ == "__main__":
    main()
