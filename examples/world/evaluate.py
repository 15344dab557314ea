"""How good the world model is by itself: held-out scenes against ground truth, beside a guess that looks at nothing.

    python examples/world/evaluate.py                                  # the shipped weights
    python examples/world/evaluate.py --checkpoint run/checkpoint.pt   # a run's moving average

Beside the model stand what it must beat and what it could reach:

- *guess*: the mean over training scenes of every latent; it looks at nothing;
- *cross-fade* of the first and the last frame;
- *other path*: the true scene, seen along another of the paths that have the same ends. A planner that draws paths as the
  scenes do, and is perfect otherwise, does as well as that;
- *straight path*: the true scene, seen along the path in the middle of all these, which is what planning is trained on.

Caching is not tried here; `examples/fidelity.py` does that.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from world.latents import World, decode, encode
from world.model import FRAMES, SIZE, TASKS, world_scheduler, world_transformer
from world.pipeline import WEIGHTS, WorldModelPipeline
from world.render import Clips, render
from world.scenes import HELD_OUT, TRAINING, Scenes, sample_scenes, straightened

GUESSED_FROM = 256
"""Training scenes whose mean is the guess."""


def load(checkpoint: Path | None) -> WorldModelPipeline:
    """The shipped pipeline, or that of a run's moving average."""
    if checkpoint is None:
        return WorldModelPipeline.from_pretrained(WEIGHTS)
    state = torch.load(checkpoint, map_location="cpu")
    transformer = world_transformer(**state.get("sizes", {}))
    transformer.load_state_dict(state["average"])
    return WorldModelPipeline(transformer.eval(), world_scheduler())


def angles(rotations: Tensor) -> Tensor:
    """Angles in degrees of rotations [..., 3, 3]."""
    cosine = (rotations.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    return cosine.clamp(-1, 1).arccos().rad2deg()


def image_errors(rgb: Tensor, truth: Tensor) -> dict[str, float]:
    """How near the frames between the ends, [B, F, 3, S, S], come to the true ones, and how sharp they are."""
    rgb, truth = rgb[:, 1:-1], truth[:, 1:-1]
    psnr = -10 * (rgb - truth).square().mean(dim=(1, 2, 3, 4)).log10()
    return {
        "RGB of frames 1 to 4, PSNR dB": float(psnr.mean()),
        "their gradient energy over the truth's": float(gradient_energy(rgb) / gradient_energy(truth)),
    }


def gradient_energy(rgb: Tensor) -> Tensor:
    """Mean square of the differences of neighbouring pixels, over all images [..., S, S]."""
    return rgb.diff(dim=-1).square().mean() + rgb.diff(dim=-2).square().mean()


def errors(world: Any, clips: Clips) -> dict[str, float]:
    """Mean errors against ground truth of a `World` or of the pipeline's output; RGB of the end frames, given, is left out."""
    ratio = world.depth / clips.depth
    turned = world.poses[:, 1:, :3, :3].mT @ clips.poses[:, 1:, :3, :3]
    shifted = (world.poses - clips.poses)[:, 1:, :3, 3]
    return {
        **image_errors(world.rgb, clips.rgb),
        "depth Abs Rel": float((ratio - 1).abs().mean()),
        "depth δ<1.25": float((torch.maximum(ratio, 1 / ratio) < 1.25).float().mean()),
        "camera turn error, degrees": float(angles(turned).mean()),
        "camera place error, m": float(shifted.norm(dim=-1).mean()),
    }


def cross_fade(rgb: Tensor) -> Tensor:
    """Frames [B, F, 3, S, S] that fade from the first to the last."""
    share = torch.linspace(0, 1, rgb.shape[1])[:, None, None, None]
    return torch.lerp(rgb[:, :1], rgb[:, -1:], share)


def references(scenes: Scenes, clips: Clips) -> dict[str, dict[str, float]]:
    """Errors of what a planner can be held against, by name; see the top of this file."""
    others = sample_scenes(range(TRAINING, TRAINING + len(scenes.bend)))
    return {
        "guess": errors(mean_world(FRAMES, SIZE, len(scenes.bend)), clips),
        "cross-fade": image_errors(cross_fade(clips.rgb), clips.rgb),
        "other path": errors(render(replace(scenes, bend=others.bend)), clips),
        "straight path": errors(render(straightened(scenes)), clips),
    }


def mean_world(frames: int, size: int, count: int) -> World:
    """What a model that looks at nothing could say: the mean latents of `GUESSED_FROM` training scenes, `count` times."""
    mean = encode(render(sample_scenes(range(TRAINING, TRAINING + GUESSED_FROM)), frames, size)).mean(dim=0)
    return decode(mean.expand(count, *mean.shape))


def picture(clips: Clips, outputs: dict[str, Any], path: Path, count: int) -> None:
    """RGB and disparity of the first clips: true, then of each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [("true", clips.rgb, clips.depth), *((task, out.rgb, out.depth) for task, out in outputs.items())]
    height, frames = 2 * len(rows) * count, clips.rgb.shape[1]
    figure, axes = plt.subplots(height, frames, figsize=(frames, height), layout="compressed", squeeze=False)
    for c in range(count):
        for r, (name, rgb, depth) in enumerate(rows):
            for k in range(2):
                line = axes[2 * (len(rows) * c + r) + k]
                line[0].set_ylabel(name if k == 0 else "disparity", fontsize=7)
                for f in range(frames):
                    image = rgb[c, f].permute(1, 2, 0) if k == 0 else 1 / depth[c, f]
                    line[f].imshow(image.numpy(), cmap="magma", vmin=0, vmax=0.7)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=60)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Prints a table, and saves a picture if told where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of train.py; the shipped weights if not given")
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--steps", type=int, help="50 for planning, 30 for reconstruction if not given")
    parser.add_argument("--guidance", type=float, help="3.0 for planning, 1.0 for reconstruction if not given")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--straight", action="store_true", help="scenes whose camera paths do not bow")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args(argv)
    pipe = load(arguments.checkpoint)
    scenes = sample_scenes(range(HELD_OUT, HELD_OUT + arguments.scenes))
    if arguments.straight:
        scenes = straightened(scenes)
    clips = render(scenes)
    outputs, columns = {}, {}
    for task in arguments.tasks:
        generator = torch.Generator().manual_seed(0)
        outputs[task] = pipe(clips.rgb, task, arguments.steps, arguments.guidance, generator=generator)
        columns[task] = errors(outputs[task], clips)
    columns |= references(scenes, clips)
    rows = [[name, *(column.get(name) for column in columns.values())] for name in columns["guess"]]
    print(tabulate(rows, headers=[f"{arguments.scenes} held-out scenes", *columns], floatfmt=".3f"))
    if arguments.picture:
        picture(clips, outputs, arguments.picture, min(4, arguments.scenes))


if __name__ == "__main__":
    main()
