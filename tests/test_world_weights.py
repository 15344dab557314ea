"""The shipped weights: they load, are small, and beat a guess that looks at nothing on scenes they have never seen."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from .support.examples import example, world

evaluate, pipeline, render, scenes = (world(name) for name in ("evaluate", "pipeline", "render", "scenes"))
COUNT = 2


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = pipeline.WorldModelPipeline.from_pretrained(pipeline.WEIGHTS)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@cache
def clips() -> Any:
    return render.render(scenes.sample_scenes(range(scenes.HELD_OUT + 500, scenes.HELD_OUT + 500 + COUNT)))


@cache
def guess() -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "GUESSED_FROM", 64)  # rendered for this alone
        found: dict[str, float] = evaluate.errors(evaluate.mean_world(6, 32, COUNT), clips())
    return found


def test_weights_are_small_and_whole(pipe: Any) -> None:
    files = [file for file in pipeline.WEIGHTS.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    assert sum(file.stat().st_size for file in files) < 16e6
    (path,) = (file for file in files if file.suffix == ".safetensors")
    with safe_open(path, "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F16"}  # noqa: SIM118, not a dict
    assert pipe.transformer.dtype == torch.float32
    assert pipe.transformer.config.num_layers >= 16
    assert not pipe.transformer.training


def test_reconstruction_finds_depth_and_camera(pipe: Any) -> None:
    out = pipe(clips().rgb, "reconstruction", 8, generator=torch.Generator().manual_seed(0))
    found = evaluate.errors(out, clips())
    assert found["RGB of frames 1 to 4, PSNR dB"] > 33
    assert found["depth Abs Rel"] < 0.9 * guess()["depth Abs Rel"]
    assert found["depth δ<1.25"] > guess()["depth δ<1.25"]
    assert found["camera turn error, degrees"] < 0.6 * guess()["camera turn error, degrees"]
    assert found["camera place error, m"] < 0.85 * guess()["camera place error, m"]


def test_planning_keeps_the_given_frames_and_fills_the_rest(pipe: Any) -> None:
    out = pipe(clips().rgb, "planning", 8, generator=torch.Generator().manual_seed(0))
    given = -10 * (out.rgb - clips().rgb)[:, [0, -1]].square().mean().log10()
    assert given > 20
    found = evaluate.errors(out, clips())
    assert found["RGB of frames 1 to 4, PSNR dB"] > guess()["RGB of frames 1 to 4, PSNR dB"] + 1
    faded = evaluate.image_errors(evaluate.cross_fade(clips().rgb), clips().rgb)
    assert found["RGB of frames 1 to 4, PSNR dB"] > faded["RGB of frames 1 to 4, PSNR dB"]
    assert found["their gradient energy over the truth's"] > 0.8 > faded["their gradient energy over the truth's"]
    assert found["camera turn error, degrees"] < 0.85 * guess()["camera turn error, degrees"]


@pytest.mark.parametrize(
    "path", sorted((pipeline.WEIGHTS.parent / "results").glob("*/fidelity.json")), ids=lambda path: path.parent.name
)
def test_results_of_the_bench_are_of_these_weights(path: Path) -> None:
    run = example("_fidelity_run")
    assert json.loads(path.read_text())["weights"] == run.digest(sorted(pipeline.WEIGHTS.rglob("*.safetensors")))
