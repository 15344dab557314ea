"""Aether, the published world model, with plain torch.compile and with hero_fx: planning, prediction, reconstruction.

    python examples/aether/run.py --weights AetherV1 --base CogVideoX-5b-I2V --task planning --image first.png --goal last.png
    python examples/aether/run.py --weights AetherV1 --base CogVideoX-5b-I2V --task prediction --image first.png --raymap r.npy
    python examples/aether/run.py --weights AetherV1 --base CogVideoX-5b-I2V --task reconstruction --video clip.mp4 --steps 30

`--weights` has the transformer (AetherWorldModel/AetherV1 on Hugging Face), `--base` the autoencoder, text encoder, tokenizer
and scheduler (THUDM/CogVideoX-5b-I2V). The authors' pipeline runs where it is installed, ours otherwise. Every system of
`--systems` runs on the same noise; below `--out`, each has a folder with RGB and disparity (videos), depth and the camera's
path (numbers) and a picture, and `report.md` and `report.json` have the table: time, memory, FLOPs, distance to full compute.

Not yet run on the published weights or on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from _aether.cli import add_options, check_options, fixed_inputs, pipe_of, runner_of
from _aether.load import Missing
from _aether.media import middle_of, read_frames, write_scene
from _aether.pipeline import GUIDANCE, STEPS, TASKS
from _aether.runner import SYSTEMS, normal_of, row
from _aether.scene import Scene, assemble, by_time, distances, slide_disparity
from _aether.windows import window_frames


def inputs_of(arguments: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """What the task is given, read from files.

    Raises:
        Missing: a file is not there.
        ValueError: an input that the task needs was not given.
    """
    needed = {"planning": ("image", "goal"), "prediction": ("image",), "reconstruction": ("video",)}[arguments.task]
    for name in ("image", "goal", "video"):
        if (getattr(arguments, name) is None) == (name in needed):
            raise ValueError(
                f"--task {arguments.task} takes {' and '.join('--' + n for n in needed)}, and no other of them"
            )
    found: dict[str, Any] = {}
    for name in needed:
        frames = read_frames(getattr(arguments, name), size, crop=name != "video" or not arguments.slide)
        found[name] = frames if name == "video" else frames[0]
    if arguments.raymap is not None:
        if not arguments.raymap.is_file():
            raise Missing(f"--raymap {arguments.raymap}: no such file")
        found["raymap"] = np.load(arguments.raymap)
    return found


def scene_of(call: Callable[..., Any], given: dict[str, Any], arguments: argparse.Namespace) -> tuple[Scene, list[Any]]:
    """The scene that calls of the pipeline give, and the outputs of these that make up its RGB and cameras."""
    if arguments.task != "reconstruction":
        outputs = [call(**given)]
        return assemble(outputs, [0], smooth=arguments.smooth), outputs
    video, size = given["video"], arguments.size
    outputs, begin = by_time(
        lambda frames: call(video=frames), middle_of(video, size), arguments.frames, arguments.stride
    )
    scene = assemble(outputs, begin, smooth=arguments.smooth)
    if arguments.slide:
        whole = slide_disparity(lambda x: call(video=x), video, arguments.frames, arguments.stride, size)
        scene = Scene(rgb=video, disparity=whole, poses=scene.poses, focals=scene.focals * size[1] / video.shape[2])
    return scene, outputs


def run(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs every system and writes what it gives; the figures by system.

    Raises:
        Missing: weights, files or packages are not there.
        ValueError: options that do not fit.
    """
    pipe = pipe_of(arguments)
    arguments.steps = arguments.steps or STEPS[arguments.task]
    given = inputs_of(arguments, arguments.size)
    warm_up = dict(given)
    if arguments.task == "reconstruction":
        arguments.frames = window_frames(len(given["video"]), arguments.frames)
        warm_up["video"] = middle_of(given["video"], arguments.size)[: arguments.frames]
    guidance = GUIDANCE[arguments.task] if arguments.guidance is None else arguments.guidance
    fixed = fixed_inputs(arguments, arguments.task, guidance)
    print(
        f"{type(pipe).__name__}, {pipe.transformer.config.num_layers} layers; {arguments.task}, {arguments.frames} frames "
        f"of {fixed['height']} x {fixed['width']}, {arguments.steps} steps; {arguments.device}, {arguments.dtype}"
    )
    runner = runner_of(pipe, arguments, arguments.steps, interval=arguments.interval, plan=arguments.plan)
    results, outputs = [], {}
    for name in arguments.systems:
        system = runner.system(name)
        print(f"{name}: compiling ...", flush=True)
        with runner.measured(system, **fixed, **warm_up) as found:
            scene, outputs[name] = scene_of(lambda s=system, **more: runner.call(s, **fixed, **more), given, arguments)
        results.append((system, found))
        write_scene(scene, arguments.out / name, arguments.fps)
        print(f"{name}: {found['seconds']:.1f} s, peak memory {found['peak_gb']:.2f} GB", flush=True)
    normal = normal_of([system for system, _ in results])
    report = {system.name: row(system, found, arguments.steps, normal) for system, found in results}
    full = next((name for name in ("plain", "full") if name in outputs), None)
    if full is not None:
        for name in outputs.keys() - {full}:
            report[name] |= distances(outputs[name], outputs[full])
    return report


def table(report: dict[str, dict[str, Any]]) -> str:
    """The report as Markdown, a column for each system."""
    keys = list(dict.fromkeys(key for of in report.values() for key in of))
    rows = [[key, *("" if of.get(key) is None else _cell(of[key]) for of in report.values())] for key in keys]
    return tabulate(rows, headers=["", *report], tablefmt="github", disable_numparse=True)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(result)
    add = result.add_argument
    add("--task", required=True, choices=TASKS)
    add("--image", type=Path, help="first frame, for planning and prediction")
    add("--goal", type=Path, help="last frame, for planning")
    add("--video", type=Path, help="a video or a folder of images, for reconstruction")
    add("--raymap", type=Path, help="camera rays to follow: .npy of [frames, 6, height / 8, width / 8]")
    add("--systems", nargs="+", default=["plain", "hero"], choices=[*SYSTEMS, "plan"], metavar="NAME",
        help=f"of {', '.join(SYSTEMS)}, plan; distances are to plain, or to full")  # fmt: skip
    add("--plan", type=Path, help="file of a calibrated plan, for the system plan")
    add("--interval", type=int, default=2, help="N: a full step every N steps")
    add("--steps", type=int, help=f"{STEPS} if not given; the paper reconstructs with 30")
    add("--guidance", type=float, help=f"{GUIDANCE} if not given")
    add("--stride", type=int, default=24, help="frames between windows of a longer video")
    add("--slide", action="store_true", help="windows over larger frames too, in place of cropping them")
    add("--smooth", action="store_true", help="take jitter out of the cameras, as the authors do")
    add("--out", type=Path, default=Path("aether-out"))
    return result


def main(argv: list[str] | None = None) -> None:
    """Runs the systems, prints the table, and writes it."""
    commands = parser()
    arguments = commands.parse_args(argv)
    check_options(commands, arguments)
    if ("plan" in arguments.systems) != (arguments.plan is not None):
        commands.error("--plan FILE and the system plan go together: give both or neither")
    if arguments.slide and arguments.task != "reconstruction":
        commands.error(f"--slide is for reconstruction: --task {arguments.task} makes frames of the model's own size")
    try:
        report = run(arguments)
    except (Missing, ValueError) as error:
        commands.exit(1, f"{error}\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "report.md").write_text(table(report) + "\n")
    print(f"\n{table(report)}\n\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
