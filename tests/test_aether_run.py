"""`examples/aether/run.py` on parts with random weights in the published layout: the whole command, every task."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from .support.examples import example, package
from .support.tiny_aether import FRAMES, HEIGHT, WIDTH, save_tiny_aether

run = example("aether/run")
load, pipeline, raymaps = (package(f"_aether.{name}") for name in ("load", "pipeline", "raymaps"))
INPUTS = {
    "planning": "--image a.png --goal b.png --inner aot_eager --systems plain hero",
    "prediction": "--image a.png --raymap rays.npy --fps 24 --systems full --steps 2",
    "reconstruction": "--video clip --stride 4 --smooth --attention flash --systems plain full --steps 2",
}
"""What each task is given; every system but `plain` compiles the model anew, so each has those that its checks need."""


@dataclass(frozen=True)
class Published:
    """Folders of weights, and files to run on."""

    weights: Path
    base: Path
    data: Path

    def run(self, out: Path, arguments: str) -> None:
        """The command, in the folder of the files."""
        fixed = f"--weights {self.weights} --base {self.base} --pipeline ours --device cpu --dtype float32 --steps 6"
        run.main(f"{fixed} --inner eager --out {out} {arguments}".split())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("aether")
    weights, base = save_tiny_aether(folder)
    drawn = np.random.default_rng(0)
    for name in ("a", "b"):
        iio.imwrite(folder / f"{name}.png", drawn.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    (folder / "clip").mkdir()
    for i in range(FRAMES + 4):
        iio.imwrite(folder / "clip" / f"{i:03d}.png", drawn.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    poses = np.broadcast_to(np.eye(4), (FRAMES, 4, 4))
    np.save(folder / "rays.npy", raymaps.raymap_of(poses, 5.0, HEIGHT // 8, WIDTH // 8).astype(np.float32))
    return Published(weights, base, folder)


def assert_full_is_plain(report: dict[str, Any]) -> None:
    """Full compute gives what plain compute gives, bit for bit."""
    for part in ("rgb", "disparity", "raymap"):
        assert report["full"][f"{part}: relative L2 to full compute"] == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", ["planning", "prediction"])
def test_full_compute_is_plain_compute(
    task: str, published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    monkeypatch.chdir(published.data)
    inputs = INPUTS[task].partition(" --systems")[0]
    published.run(tmp_path, f"--task {task} {inputs} --systems plain full --steps 2")
    assert_full_is_plain(json.loads((tmp_path / "report.json").read_text()))


@pytest.mark.parametrize("task", INPUTS)
def test_every_task_runs_and_all_of_it_is_written(
    task: str, published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    monkeypatch.chdir(published.data)
    published.run(tmp_path, f"--task {task} {INPUTS[task]}")
    report = json.loads((tmp_path / "report.json").read_text())
    frames = FRAMES + 4 if task == "reconstruction" else FRAMES
    for name in report:
        folder = tmp_path / name
        for video in ("rgb", "disparity"):
            assert iio.imread(folder / f"{video}.mp4", plugin="pyav").shape == (frames, HEIGHT, WIDTH, 3)
        assert np.load(folder / "depth.npz")["disparity"].shape == (frames, HEIGHT, WIDTH)
        path = np.loadtxt(folder / "trajectory.txt")
        np.testing.assert_array_equal(path[:, 0], np.arange(frames))
        np.testing.assert_allclose(np.linalg.norm(path[:, 4:], axis=1), 1, atol=1e-6)
        assert iio.imread(folder / "picture.png").size
        assert report[name]["seconds of denoising, a window"] <= report[name]["seconds, all"]
    if task == "reconstruction":
        assert_full_is_plain(report)
    if task == "planning":
        of = report["hero"]
        assert of["full + cached steps"] == "5 + 1"
        assert 0 < of["rgb: relative L2 to full compute"] < 1
        assert of["TFLOPs of a window, with attention"] < report["plain"]["TFLOPs of a window, with attention"]
        assert of["feature state, GB"] > 0 < of["peak memory, GB"]
        assert "| full + cached steps" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task planning --image a.png", "--task planning takes --image and --goal, and no other"),
        ("--task prediction --image none.png", "none.png: no such file"),
        ("--task prediction --image a.png --raymap none.npy", "none.npy: no such file"),
        ("--task reconstruction --video a.png", "a clip of 1 frames is too short"),
        ("--task prediction --image a.png --systems plan", "--plan FILE and the system plan go together"),
        ("--task prediction --image a.png --slide", "--slide is for reconstruction"),
        ("--task prediction --image a.png --offload", "--device cpu has none"),
        ("--task prediction --image a.png --pipeline authors --dtype bfloat16", "clone InternRobotics/Aether"),
        ("--task prediction --image a.png --pipeline authors", "bfloat16 alone"),
        ("--task prediction --image a.png --weights nowhere", "download AetherWorldModel/AetherV1 from Hugging Face"),
        ("--task prediction --image a.png --base nowhere", "download THUDM/CogVideoX-5b-I2V from Hugging Face"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: str, message: str, published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(published.data)
    with pytest.raises(SystemExit):
        published.run(tmp_path, arguments)
    assert message in capsys.readouterr().err


def test_the_authors_pipeline_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = type("AetherV1PipelineCogVideoX", (), {})
    assert load.pipeline_class(None, torch.bfloat16) is pipeline.AetherPipeline
    module = type(pipeline)("theirs")
    module.AetherV1PipelineCogVideoX = theirs
    monkeypatch.setitem(sys.modules, load.AUTHORS, module)
    assert load.pipeline_class(None, torch.bfloat16) is theirs
    assert load.pipeline_class(None, torch.float32) is pipeline.AetherPipeline
    assert load.pipeline_class(False, torch.bfloat16) is pipeline.AetherPipeline


@pytest.fixture(scope="module")
def pipe(published: Published) -> Any:
    return load.load(published.weights, published.base, dtype=torch.float32, authors=False)


def test_time_runs_by_frames_per_second(pipe: Any) -> None:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    usual = get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), temporal_size=3)
    torch.testing.assert_close(pipe._rotary(3, 4, 6, 1.0), usual)
    half = pipe._rotary(3, 4, 6, 0.5)
    time, space = slice(0, 4), slice(4, None)
    # Frame 2 at half the pace stands where frame 1 stands at the full one; places in the image stay.
    torch.testing.assert_close(half[0][12:18, time], usual[0][6:12, time])
    torch.testing.assert_close(half[1][:, space], usual[1][:, space])


def test_conditions_lie_where_they_belong(pipe: Any) -> None:
    image, rays = np.full((HEIGHT, WIDTH, 3), 0.25), np.random.default_rng(0).normal(size=(FRAMES, 6, 4, 6))
    first, last = (pipe._encode(x[None], torch.Generator().manual_seed(0)) for x in (image, image))
    told = pipe._condition([first, last], rays, FRAMES, HEIGHT, WIDTH)
    assert told.shape == (1, 3, 40, 4, 6)
    assert torch.equal(told[:, [0, -1], :16], torch.cat([first, last], dim=1))
    assert not told[:, 1, :16].any()
    np.testing.assert_allclose(raymaps.unpack(told[:, :, 16:], FRAMES)[0].numpy(), rays.astype(np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"task": "dreaming"}, "task='dreaming': must be one of"),
        ({"task": "planning", "image": np.zeros((HEIGHT, WIDTH, 3))}, "takes image and goal: goal is missing"),
        ({"task": "prediction", "image": np.zeros((HEIGHT, WIDTH))}, r"image has shape \(32, 48\): must be"),
        ({"task": "prediction", "image": np.zeros((8, 8, 3)), "height": 8}, "must be multiples of 16"),
        ({"task": "reconstruction", "video": np.zeros((8, 32, 48, 3)), "num_frames": 8}, "num_frames=8: must be 1 more"),
    ],
)  # fmt: skip
def test_the_pipeline_refuses_what_does_not_fit(call: dict[str, Any], message: str, pipe: Any) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**call)
