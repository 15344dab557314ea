"""`examples/aether/evaluate.py`: data in its real layout, scores, the tables, and the whole command on tiny random weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

from .support.examples import example, package
from .support.tiny_aether import FRAMES, HEIGHT, WIDTH, save_tiny_aether

evaluate = example("aether/evaluate")
data, paper, scores, raymaps = (package(f"_aether.{name}") for name in ("data", "paper", "scores", "raymaps"))
load = package("_aether.load")
metrics = package("_metrics")
STEP = np.array([0.02, 0.01, 0.1])


def path(frames: int) -> Any:
    """Camera-to-world poses of a camera that goes straight on and sideways."""
    poses = np.broadcast_to(np.eye(4), (frames, 4, 4)).copy()
    poses[:, :3, 3] = np.arange(frames)[:, None] * STEP
    return poses


def tagged(kind: str, *parts: Any) -> bytes:
    return np.array([202021.25], "<f4").tobytes() + b"".join(np.asarray(part, kind).tobytes() for part in parts)


def write_sintel(root: Path, name: str, frames: int = FRAMES, height: int = 36, width: int = 72) -> Any:
    """A sequence in Sintel's layout, frames wider than the model's; its depth."""
    drawn = np.random.default_rng(len(name))
    depth = drawn.uniform(1, 80, (frames, height, width)).astype(np.float32)
    folders = [root / "training" / kind / name for kind in ("final", "depth", "camdata_left")]
    for folder in folders:
        folder.mkdir(parents=True)
    for i, pose in enumerate(path(frames)):
        stem = f"frame_{i + 1:04d}"
        iio.imwrite(folders[0] / f"{stem}.png", drawn.integers(0, 255, (height, width, 3), dtype=np.uint8))
        head = np.array([width, height], "<i4").view("<f4")
        (folders[1] / f"{stem}.dpt").write_bytes(tagged("<f4", head, depth[i]))
        (folders[2] / f"{stem}.cam").write_bytes(tagged("<f8", np.diag([50.0, 50.0, 1.0]), np.linalg.inv(pose)[:3]))
    return depth


def write_realestate(root: Path, name: str, frames: int) -> None:
    """A clip in RealEstate10K's layout."""
    folder = root / "frames" / "test" / name
    folder.mkdir(parents=True)
    (root / "test").mkdir(exist_ok=True)
    lines = ["the address of a video"]
    for i, pose in enumerate(path(frames)):
        at = 33_366 * (i + 1)
        numbers = [0.5, 0.9, 0.5, 0.5, 0, 0, *np.linalg.inv(pose)[:3].ravel()]
        lines.append(" ".join([str(at), *(f"{x:.9f}" for x in numbers)]))
        iio.imwrite(folder / f"{at}.png", np.full((40, 64, 3), 10 * i, np.uint8))
    (root / "test" / f"{name}.txt").write_text("\n".join(lines) + "\n")


def test_sintel_is_read_as_it_is_laid_out(tmp_path: Path) -> None:
    depth = write_sintel(tmp_path, "alley_2")
    write_sintel(tmp_path, "bamboo_1")
    clips = data.sintel(tmp_path)
    assert [clip.name for clip in clips] == ["alley_2", "bamboo_1"]
    (clip,) = data.sintel(tmp_path, ["alley_2"])
    np.testing.assert_array_equal(clip.depth(), depth)
    np.testing.assert_allclose(clip.poses, path(FRAMES))
    assert clip.read((HEIGHT, WIDTH), crop=False).shape == (FRAMES, HEIGHT, 64, 3)
    assert clip.read((HEIGHT, WIDTH), crop=True).shape == (FRAMES, HEIGHT, WIDTH, 3)
    clip.depths[0].unlink()
    with pytest.raises(
        load.Missing, match=r"alley_2 .* is not complete \(9 in final/, 8 in depth/, 9 in camdata_left/\)"
    ):
        data.sintel(tmp_path)
    broken = tmp_path / "broken.dpt"
    broken.write_bytes(tagged("<f4", np.array([7, 7], "<i4").view("<f4"), np.zeros(3)))
    for read in (data.read_depth, data.read_camera):
        with pytest.raises(ValueError, match=r"get it again from sintel.is.tue.mpg.de"):
            read(broken)
    with pytest.raises(load.Missing, match=r"training/final is not there: get Sintel from sintel.is.tue.mpg.de"):
        data.sintel(tmp_path / "nowhere")


def test_realestate_is_read_as_it_is_laid_out(tmp_path: Path) -> None:
    for name, frames in (("b", 9), ("a", 20), ("c", 4)):
        write_realestate(tmp_path, name, frames)
    clips = data.realestate(tmp_path, None, frames=9, stride=1)
    assert [(clip.name, len(clip.frames)) for clip in clips] == [("a", 9), ("b", 9)]
    (clip,) = data.realestate(tmp_path, 1, frames=9, stride=2)
    np.testing.assert_allclose(clip.poses, path(20)[:18:2], atol=1e-8)
    shown = clip.read((HEIGHT, WIDTH), crop=True)[:, 0, 0, 0]
    np.testing.assert_allclose(shown, np.arange(0, 180, 20) / 255)
    with pytest.raises(load.Missing, match=r"no clip of .* has 41 frames"):
        data.realestate(tmp_path, None, frames=41, stride=1)
    with pytest.raises(load.Missing, match=r"get RealEstate10K from google.github.io/realestate10k"):
        data.realestate(tmp_path / "test", None, frames=9, stride=1)


def test_depth_is_scaled_to_the_least_absolute_error_and_far_pixels_do_not_count() -> None:
    drawn = np.random.default_rng(0)
    truth = drawn.uniform(1, 80, (2, 12, 16))
    ours = truth * drawn.uniform(0.5, 2, truth.shape) / 7
    errors, count = scores.video_depth(ours, truth)
    near = truth < 70
    assert count == near.sum()
    scales = np.linspace(1, 20, 4001)
    sums = [np.abs(scale * ours[near] - truth[near]).sum() for scale in scales]
    aligned = (scales[np.argmin(sums)] * ours[near]).clip(max=70)
    assert errors["abs_rel"] == pytest.approx((np.abs(aligned - truth[near]) / truth[near]).mean(), abs=1e-3)
    perfect, _ = scores.video_depth(truth / 3, truth)
    assert perfect == pytest.approx({"abs_rel": 0, "delta_1": 1, "delta_2": 1})


def test_a_perfect_model_scores_perfectly(tmp_path: Path) -> None:
    """What is called tells the truth of whichever window it is shown: an image whose values are disparity and time."""
    write_sintel(tmp_path, "alley_2", frames=13, height=HEIGHT, width=64)
    (clip,) = data.sintel(tmp_path)
    true = 1 / (1 + np.add.outer(np.arange(13), np.add.outer(np.arange(HEIGHT), np.arange(64)) / 8))
    time = np.broadcast_to(np.arange(13)[:, None, None], true.shape)
    shown = np.stack([true, time, time], axis=-1)
    known = SimpleNamespace(
        name=clip.name, frames=clip.frames, poses=clip.poses, depth=lambda: 1 / true,
        read=lambda size, crop: shown[:, :, 8:56] if crop else shown,
    )  # fmt: skip

    def call(video: Any, num_frames: int) -> Any:
        assert video.shape == (num_frames, HEIGHT, WIDTH, 3)
        poses = path(13)[int(video[0, 0, 0, 1]) :][:num_frames]
        return SimpleNamespace(rgb=video, disparity=video[..., 0], raymap=raymaps.raymap_of(poses, 5.0, 4, 6))

    arguments = argparse.Namespace(size=(HEIGHT, WIDTH), frames=9, cameras=["alley_2"], camera_metrics="own")
    found = evaluate.reconstruct(call, [known], arguments)
    assert found["abs_rel"] == pytest.approx(0, abs=1e-9)
    assert found["delta_1"] == found["delta_2"] == 1
    assert found["rpe_rot"] == pytest.approx(0, abs=1e-4)
    assert found["ate"] < 0.02, "smoothing takes a little of the start"


def test_the_rows_are_those_of_the_paper() -> None:
    rows = [row for number in (1, 2, 3, 4) for row in paper.table_rows(number)]
    assert sorted(row.name for row in rows if row.paper) == sorted(paper.FIGURES)
    assert [len(paper.table_rows(number)) for number in (1, 2, 3, 4)] == [7, 7, 5, 7]
    for row in rows:
        assert row.options.get("policy") != "hero" or row.options["unsampled"] == "reuse"
    hero = next(row for row in rows if row.name == "reconstruction, HERO N=2")
    assert (hero.steps, hero.paper["abs_rel"], hero.paper["rpe_rot"], hero.paper["tflops"]) == (
        30,
        0.344,
        0.816,
        2593.9,
    )


def test_evo_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(scores.importlib, "import_module", absent)
    with pytest.raises(load.Missing, match=r"pip install 'hero-fx\[aether\]', or take --camera-metrics own"):
        scores.camera_path(path(5), path(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and both data sets, tiny."""
    root = tmp_path_factory.mktemp("tables")
    save_tiny_aether(root)
    write_sintel(root / "sintel", "alley_2")
    write_realestate(root / "realestate", "a", FRAMES)
    return root


def command(folder: Path, *arguments: str) -> None:
    options = (
        "--pipeline ours --device cpu --dtype float32 --steps 6 --inner eager --camera-metrics own --frame-stride 1"
    )
    places = {"--weights": "AetherV1", "--base": "CogVideoX-5b-I2V", "--sintel": "sintel", "--realestate": "realestate"}
    given = [x for name, place in places.items() for x in (name, str(folder / place))]
    evaluate.main([*given, *options.split(), "--out", str(folder / "out"), *arguments])


def test_the_tables_stand_beside_the_papers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(folder))
    chosen = ("--tables", "1", "2", "--rows", "full compute", "reconstruction, FORA")
    command(folder, *chosen)
    assert "no VBench scores: the package vbench cannot be imported" in capsys.readouterr().out
    results = json.loads((folder / "out" / "results.json").read_text())
    assert list(results) == ["planning, full compute", "reconstruction, full compute", "reconstruction, FORA N=2"]
    full, fora = results["reconstruction, full compute"], results["reconstruction, FORA N=2"]
    assert set(fora) >= {*paper.DEPTH, *paper.CAMERA, "seconds", "tflops", "state_gb"}
    assert (full["speed"], fora["speed"]) == (1, pytest.approx(full["tflops"] / fora["tflops"]))
    assert fora["speed"] > 1
    planned = folder / "out" / "planning-full-compute"
    assert iio.imread(planned / "videos" / "a.mp4", plugin="pyav").shape == (FRAMES, HEIGHT, WIDTH, 3)
    (planned / "vbench.json").write_text(json.dumps(dict.fromkeys(paper.VBENCH, 0.875)))
    before = (folder / "out" / "results.json").read_text()
    command(folder, *chosen, "--report-only")
    assert (
        json.loads((folder / "out" / "results.json").read_text())["planning, full compute"]["imaging_quality"] == 87.5
    )
    assert results == json.loads(before)
    table = (folder / "out" / "tables.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| planning, full compute")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:4] == ["93.7", "87.5"]
    assert cells[-3] == "14352"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "nonesuch"), "--rows nonesuch: no row of tables [1, 2, 3, 4] has such a name"),
        (("--tables", "2", "--sintel", "nowhere"), "get Sintel from sintel.is.tue.mpg.de"),
        (("--tables", "3", "--realestate", "nowhere"), "get RealEstate10K from google.github.io/realestate10k"),
        (("--tables", "1", "--weights", "nowhere"), "download AetherWorldModel/AetherV1"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(folder, *arguments)
    assert message in capsys.readouterr().err
