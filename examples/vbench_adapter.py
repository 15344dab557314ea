"""VBench's six planning metrics (the paper's Table 1) on clips that this project samples.

    python examples/vbench_adapter.py write --videos FOLDER [--scenes 64] [--method HERO --interval 2]
    python examples/vbench_adapter.py score --videos FOLDER [--device cuda] [--json]

`write` plans clips with the world model of `examples/world` and writes one H.264 file each; `write_videos` does the same with
frames from anywhere. `score` hands a folder of videos to the package `vbench` and prints its six numbers.

The two are separate because vbench 0.1.5 pins numpy < 2 and transformers 4.33.2: it wants an environment of its own, and
`score` needs nothing but vbench. Its metrics run DINO, CLIP (B/32 and L/14), AMT, RAFT, LAION's aesthetic head and MUSIQ; their
weights must be in `VBENCH_CACHE_DIR` (default `~/.cache/vbench`). This script downloads nothing: it says which files are missing.

Not tested: these networks. Neither their weights nor an environment with vbench's pins were to be had where this was written.
Tested are the written files (read back frame by frame), the errors, and the calls, against a stand-in with the interface of
vbench 0.1.5. VBench is also made for real video of 16 frames and more: on the small world model's 6 frames of 32 x 32 pixels its
numbers would mean little; write the clips of a real model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS: dict[str, tuple[str, ...]] = {
    "subject_consistency": ("dino_model/facebookresearch_dino_main", "dino_model/dino_vitbase16_pretrain.pth"),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
}
"""VBench's names of the six metrics, and the files that each reads below `VBENCH_CACHE_DIR`."""


class VBenchMissing(RuntimeError):
    """The package or weights it needs are not here; the message says which."""


def write_videos(clips: Any, folder: Path, fps: int = 8, names: Sequence[str] | None = None) -> list[Path]:
    """Writes clips as H.264 files.

    Args:
        clips: [clips, frames, height, width, 3], floats in [0, 1] or uint8; height and width even.
        folder: made if there is none.
        fps: frames per second.
        names: of the files, without suffix; VBench takes a file's name for its prompt. `clip-000`, ... if not given.

    Returns:
        The files, in order.

    Raises:
        ValueError: the shape or the number of names does not fit.
    """
    import imageio.v3 as iio
    import numpy as np

    videos = np.asarray(clips)
    if videos.ndim != 5 or videos.shape[-1] != 3 or videos.shape[2] % 2 or videos.shape[3] % 2:
        raise ValueError(
            f"clips have shape {videos.shape}: must be [clips, frames, height, width, 3], height and width even"
        )
    names = [f"clip-{i:03d}" for i in range(len(videos))] if names is None else names
    if len(names) != len(videos):
        raise ValueError(f"{len(names)} names for {len(videos)} clips: give one each")
    if videos.dtype != np.uint8:
        videos = (255 * videos.clip(0, 1)).round().astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.mp4" for name in names]
    for path, video in zip(paths, videos, strict=True):
        iio.imwrite(path, video, plugin="pyav", codec="libx264", fps=fps)
    return paths


def missing_weights(metrics: Sequence[str], cache: Path) -> list[Path]:
    """The files that the metrics need and that are not below `cache`."""
    return [cache / name for metric in metrics for name in METRICS[metric] if not (cache / name).exists()]


def score(
    videos: Path,
    results: Path,
    metrics: Sequence[str] = tuple(METRICS),
    device: str = "cuda",
    cache: Path | None = None,
) -> dict[str, float]:
    """What VBench says of all videos in a folder, by metric, on VBench's own scales (consistencies and smoothness in [0, 1]).

    Args:
        videos: folder of `.mp4` files.
        results: folder for VBench's own files.
        metrics: names of `METRICS`.
        device: for the networks.
        cache: where their weights are, `VBENCH_CACHE_DIR` if not given.

    Raises:
        ValueError: a metric is unknown, or the folder has no video.
        VBenchMissing: the package `vbench` or weights are missing.
    """
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise ValueError(f"metrics {', '.join(unknown)} are none of VBench's planning metrics: {', '.join(METRICS)}")
    if not sorted(videos.glob("*.mp4")):
        raise ValueError(f"videos={str(videos)!r} holds no .mp4 file: write some first")
    cache = cache or Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")
    os.environ["VBENCH_CACHE_DIR"] = str(cache)  # read when vbench is imported
    try:
        package = importlib.import_module("vbench")
    except ImportError as error:
        raise VBenchMissing(
            f"the package vbench cannot be imported ({error}): make an environment of its own for it (it pins numpy < 2 and "
            "transformers 4.33.2), `pip install vbench`, and run this script there; `score` needs nothing else"
        ) from error
    if missing := missing_weights(metrics, cache):
        listed = "\n  ".join(map(str, missing))
        raise VBenchMissing(f"weights are missing; put them there, or set VBENCH_CACHE_DIR:\n  {listed}")
    bench = package.VBench(device, str(Path(package.__file__).parent / "VBench_full_info.json"), str(results))
    bench.evaluate(
        videos_path=str(videos), name="hero_fx", dimension_list=list(metrics), local=True, mode="custom_input"
    )
    found = json.loads((results / "hero_fx_eval_results.json").read_text())
    return {metric: float(found[metric][0]) for metric in metrics}


def write(arguments: argparse.Namespace) -> list[Path]:
    """Plans held-out scenes with the world model and writes them."""
    import torch

    from _fidelity_run import Runner
    from _fidelity_settings import full, methods
    from world.latents import decode

    chosen = full()
    if arguments.method is not None:
        named = {setting.name: setting for setting in methods(arguments.interval)}
        name = f"{arguments.method}, N={arguments.interval}"
        if name not in named:
            raise ValueError(f"--method {arguments.method}: choose from {', '.join(n.split(', N=')[0] for n in named)}")
        chosen = named[name]
    runner = Runner(arguments.weights, None, min(16, arguments.scenes))
    with torch.no_grad():
        (latents,) = runner.sample("planning", [chosen], arguments.scenes, chosen.name)
    frames = decode(latents).rgb.movedim(2, -1)
    enlarged = frames.repeat_interleave(arguments.enlarge, dim=2).repeat_interleave(arguments.enlarge, dim=3)
    return write_videos(enlarged.numpy(), arguments.videos)


def main(argv: list[str] | None = None) -> None:
    """Writes or scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write", help="plan clips and write them")
    writer.add_argument("--videos", type=Path, required=True)
    writer.add_argument("--scenes", type=int, default=64)
    writer.add_argument("--method", help="a method of fidelity.py; full compute if not given")
    writer.add_argument("--interval", type=int, default=2)
    writer.add_argument("--enlarge", type=int, default=8, help="pixels along a side for each pixel")
    writer.add_argument("--weights", type=Path, default=Path(__file__).parent / "world" / "weights")
    scorer = commands.add_parser("score", help="run VBench")
    scorer.add_argument("--videos", type=Path, required=True)
    scorer.add_argument("--results", type=Path, help="folder for VBench's own files; beside the videos if not given")
    scorer.add_argument("--device", default="cuda")
    scorer.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.command == "write":
        print(f"{len(write(arguments))} clips in {arguments.videos}")
        return
    try:
        found = score(arguments.videos, arguments.results or arguments.videos / "vbench", device=arguments.device)
    except (ValueError, VBenchMissing) as error:
        parser.exit(1, f"{error}\n")
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for metric, value in found.items():
        print(f"{metric.replace('_', ' '):24s}{value:8.4f}")


if __name__ == "__main__":
    main()
