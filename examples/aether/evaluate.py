"""The paper's tables on the published model: quality, seconds and FLOPs of every row, beside the paper's figures.

    python examples/aether/evaluate.py --weights AetherV1 --base CogVideoX-5b-I2V --tables 2 --sintel MPI-Sintel
    python examples/aether/evaluate.py --weights AetherV1 --base CogVideoX-5b-I2V --tables 1 3 4 --realestate RealEstate10K

Table 2 (reconstruction): depth and cameras on Sintel. Depth by windows in space and time over whole frames, on all sequences
with depth, each pixel counted alike; cameras by windows in time over the frames' middle, on the 14 sequences that move. Tables
1, 3 and 4 (planning): clips of RealEstate10K planned from their first and last frame, scored by VBench; the paper does not say
which scenes it chose, so here they are the first of the test set. Cameras are compared there too, which the paper does not do.

VBench wants an environment of its own: where it is not importable, the videos are written. Run there, for each row's folder,
`vbench_adapter.py score --json --videos DIR/videos > DIR/vbench.json`, and then this with `--report-only`.

`--out` has `results.json`, written after each row, and `tables.md`; rows that have results there are not run again. Not yet run
on the published weights, on a GPU or on the real data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import hero_fx
from _aether.cli import add_options, check_options, fixed_inputs, pipe_of, runner_of
from _aether.data import WITH_CAMERAS, Clip, realestate, sintel
from _aether.load import Missing
from _aether.paper import CAMERA, COLUMNS, DEPTH, Row, table_rows
from _aether.pipeline import GUIDANCE
from _aether.runner import Runner
from _aether.scene import assemble, by_time, depth_of, slide_disparity
from _aether.scores import camera_path, video_depth
from _aether.windows import window_frames
from vbench_adapter import VBenchMissing, score, write_videos

DEPTH_STRIDE, CAMERA_STRIDE = 8, 32
"""Frames between windows, as in Aether's evaluation."""
Results = dict[str, dict[str, Any]]


def reconstruct(call: Callable[..., Any], clips: Sequence[Clip], arguments: argparse.Namespace) -> dict[str, float]:
    """Depth and camera scores over Sintel's clips; `call` is given `video` and `num_frames`."""
    size, depths, pixels, cameras = arguments.size, [], [], []
    for clip in tqdm(clips, desc="Sintel", leave=False):
        frames = window_frames(len(clip.frames), arguments.frames)

        def window(video: Any, frames: int = frames) -> Any:
            return call(video=video, num_frames=frames)

        disparity = slide_disparity(window, clip.read(size, crop=False), frames, DEPTH_STRIDE, size)
        errors, count = video_depth(depth_of(disparity), clip.depth())
        depths.append([errors[name] for name in DEPTH])
        pixels.append(count)
        if clip.name in arguments.cameras:
            stride = min(CAMERA_STRIDE, frames)
            scene = assemble(*by_time(window, clip.read(size, crop=True), frames, stride), smooth=True)
            found = camera_path(scene.poses, clip.poses, arguments.camera_metrics)
            cameras.append([found[name] for name in CAMERA])
    result = dict(zip(DEPTH, np.average(depths, axis=0, weights=pixels).tolist(), strict=True))
    return result | (dict(zip(CAMERA, np.mean(cameras, axis=0).tolist(), strict=True)) if cameras else {})


def plan(
    call: Callable[..., Any], clips: Sequence[Clip], arguments: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """Camera scores over RealEstate10K's clips; the planned videos are written to `folder/videos`."""
    cameras = []
    for clip in tqdm(clips, desc="RealEstate10K", leave=False):
        ends = Clip(clip.name, (clip.frames[0], clip.frames[-1]), clip.poses).read(arguments.size, crop=True)
        output = call(image=ends[0], goal=ends[1], num_frames=arguments.frames)
        write_videos(output.rgb[None], folder / "videos", arguments.fps, [clip.name])
        cameras.append(camera_path(assemble([output], [0]).poses, clip.poses, arguments.camera_metrics))
    return {name: float(np.mean([found[name] for found in cameras])) for name in CAMERA}


def evaluate_row(runner: Runner, row: Row, clips: Sequence[Clip], arguments: argparse.Namespace) -> dict[str, Any]:
    """A row's figures: quality, seconds of denoising a window (median), peak memory, TFLOPs where there are step graphs."""
    system = runner.with_options(row.name, **row.options)
    fixed = fixed_inputs(arguments, row.task, GUIDANCE[row.task])
    height, width = arguments.size
    still = np.zeros((arguments.frames, height, width, 3), np.float32)
    warm_up = {"video": still} if row.task == "reconstruction" else {"image": still[0], "goal": still[0]}

    def call(**inputs: Any) -> Any:
        return runner.call(system, **{**fixed, **inputs})

    with runner.measured(system, **fixed, **warm_up) as found:
        if row.task == "reconstruction":
            result: dict[str, Any] = reconstruct(call, clips, arguments)
        else:
            result = plan(call, clips, arguments, folder_of_row(arguments.out, row.name))
    result |= {"seconds": system.total(), "peak_gb": found["peak_gb"], "state_gb": found["state_gb"]}
    if (graphs := system.graphs()) is not None:
        steps = runner.settings.steps
        spent, whole = system.flops(steps, graphs.normal), hero_fx.flops(graphs.normal) * steps
        result |= {"tflops": spent.gemm / 1e12, "tflops_with_attention": spent.total / 1e12}
        result |= {"full_tflops": whole.gemm / 1e12, "full_tflops_with_attention": whole.total / 1e12}
    return result


def folder_of_row(out: Path, name: str) -> Path:
    """Where a row's videos and VBench's scores are."""
    return out / name.replace(",", "").replace(" ", "-").replace("/", "-")


def add_vbench(results: Results, rows: Sequence[Row], arguments: argparse.Namespace) -> str | None:
    """Adds VBench's scores in per cent to rows of planning, from `vbench.json` or by running it; what hinders it, if any."""
    for row in rows:
        folder = folder_of_row(arguments.out, row.name)
        if row.task != "planning" or row.name not in results or not (folder / "videos").is_dir():
            continue
        scores = folder / "vbench.json"
        try:
            found = (
                json.loads(scores.read_text()) if scores.is_file()
                else score(folder / "videos", folder / "vbench", device=arguments.device)
            )  # fmt: skip
        except VBenchMissing as error:
            return str(error)
        scores.write_text(json.dumps(found, indent=1) + "\n")
        results[row.name] |= {name: 100 * value for name, value in found.items()}
    return None


def complete(results: Results, rows: Sequence[Row]) -> None:
    """Gives rows of full compute the FLOPs that other rows of the task know, and every row its speed-up by GEMM FLOPs."""
    for task in {row.task for row in rows}:
        of_task = [results[row.name] for row in rows if row.task == task and row.name in results]
        whole = next((of for of in of_task if "full_tflops" in of), None)
        for of in of_task if whole is not None else ():
            for name in ("tflops", "tflops_with_attention"):
                of.setdefault(name, whole[f"full_{name}"])
            of["speed"] = whole["full_tflops"] / of["tflops"]


def tables(results: Results, rows: Sequence[Row]) -> str:
    """The tables as Markdown: for every figure the paper's and ours."""
    parts = []
    for number in sorted({row.table for row in rows}):
        of_table = [row for row in rows if row.table == number]
        names = [*COLUMNS[of_table[0].task], "tflops"]
        lines = [
            [row.name, *(x for name in names for x in (row.paper.get(name), results.get(row.name, {}).get(name)))]
            for row in of_table
        ]
        headers = ["", *(head for name in names for head in (f"{name}, paper", "ours"))]
        parts.append(f"Table {number}\n\n{tabulate(lines, headers=headers, tablefmt='github', floatfmt='.5g')}\n")
    return "\n".join(parts)


def clips_of(task: str, arguments: argparse.Namespace) -> list[Clip]:
    """The data of a task.

    Raises:
        Missing: it is not there.
    """
    if task == "reconstruction":
        if arguments.sintel is None:
            raise Missing("Table 2 needs --sintel DIR, with training/final, training/depth and training/camdata_left")
        return sintel(arguments.sintel, arguments.sequences)
    if arguments.realestate is None:
        raise Missing("Tables 1, 3 and 4 need --realestate DIR, with test/ID.txt and frames/test/ID/TIMESTAMP.png")
    return realestate(arguments.realestate, arguments.scenes, arguments.frames, arguments.frame_stride)


def run(rows: Sequence[Row], results: Results, arguments: argparse.Namespace) -> None:
    """Evaluates the rows that have no result yet, and saves after each; rows with the same settings are run once.

    Raises:
        Missing: weights, data or packages are not there.
        ValueError: a file is not what it should be, or an option does not fit.
    """
    pipe = pipe_of(arguments)
    clips = {task: clips_of(task, arguments) for task in dict.fromkeys(row.task for row in rows)}
    done: dict[str, str] = {}
    for row in tqdm(rows, desc="rows"):
        same = repr((row.task, row.steps, sorted(row.options.items())))
        if row.name not in results and same in done:
            results[row.name] = dict(results[done[same]])
        elif row.name not in results:
            runner = runner_of(pipe, arguments, arguments.steps or row.steps)
            results[row.name] = evaluate_row(runner, row, clips[row.task], arguments)
            pipe.transformer = runner.model
        done[same] = row.name
        complete(results, rows)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(result)
    add = result.add_argument
    add("--tables", type=int, nargs="+", default=[1, 2, 3, 4], choices=(1, 2, 3, 4))
    add("--rows", nargs="+", help="only rows whose name holds one of these words")
    add("--sintel", type=Path, help="folder of MPI Sintel, for Table 2")
    add("--sequences", nargs="+", help="of Sintel; all if not given")
    add("--cameras", nargs="+", default=WITH_CAMERAS, help="sequences of Sintel whose cameras are compared")
    add("--realestate", type=Path, help="folder of RealEstate10K, for Tables 1, 3 and 4")
    add("--scenes", type=int, default=80, help="of RealEstate10K")
    add("--frame-stride", type=int, default=2, help="of RealEstate10K's frames (they come at 25 or 30 per second)")
    add("--camera-metrics", default="evo", choices=("evo", "own"), help="own: the same without the package evo")
    add("--steps", type=int, help="50 for planning and 30 for reconstruction if not given, as in the paper")
    add("--report-only", action="store_true", help="only read results and VBench's scores, and write the tables")
    add("--out", type=Path, default=Path("aether-tables"))
    return result


def main(argv: list[str] | None = None) -> None:
    """Evaluates, prints the tables and writes them."""
    commands = parser()
    arguments = commands.parse_args(argv)
    check_options(commands, arguments)
    rows = [row for number in arguments.tables for row in table_rows(number)]
    rows = [row for row in rows if arguments.rows is None or any(word in row.name for word in arguments.rows)]
    if not rows:
        commands.error(f"--rows {' '.join(arguments.rows)}: no row of tables {arguments.tables} has such a name")
    arguments.out.mkdir(parents=True, exist_ok=True)
    saved = arguments.out / "results.json"
    results: Results = json.loads(saved.read_text()) if saved.is_file() else {}
    try:
        if not arguments.report_only:
            run(rows, results, arguments)
    except (Missing, ValueError) as error:
        commands.exit(1, f"{error}\n")
    hindered = add_vbench(results, rows, arguments)
    saved.write_text(json.dumps(results, indent=1) + "\n")
    text = tables(results, rows)
    (arguments.out / "tables.md").write_text(text)
    print(f"\n{text}\nwritten to {arguments.out}")
    if hindered is not None:
        print(f"\nno VBench scores: {hindered}")


if __name__ == "__main__":
    main()
