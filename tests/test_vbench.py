"""The adapter as far as it can be tested without VBench's networks: files, calls, errors."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .support.examples import example


@pytest.fixture(scope="module")
def adapter() -> Any:
    return example("vbench_adapter")


@pytest.fixture
def weights(adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with an empty file for every weight."""
    cache = tmp_path / "cache"
    for names in adapter.METRICS.values():
        for name in names:
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).touch()
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(cache))
    return cache


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the package with the interface of vbench 0.1.5; what it was called with."""
    seen: list[dict[str, Any]] = []

    class VBench:
        def __init__(self, device: Any, full_info_dir: str, output_path: str) -> None:
            seen.append({"device": device, "full_info_dir": full_info_dir})
            self.output = Path(output_path)
            self.output.mkdir(parents=True, exist_ok=True)

        def evaluate(
            self, videos_path: str, name: str, prompt_list: Any = (), dimension_list: Any = None,
            local: bool = False, read_frame: bool = False, mode: str = "vbench_standard", **kwargs: Any,
        ) -> None:  # fmt: skip
            seen[-1] |= {
                "videos": sorted(p.name for p in Path(videos_path).glob("*.mp4")),
                "local": local,
                "mode": mode,
            }
            scores = {
                d: [0.1 * i, [{"video_path": "", "video_results": 0.1 * i}]] for i, d in enumerate(dimension_list)
            }
            (self.output / f"{name}_eval_results.json").write_text(json.dumps(scores))

    package: Any = types.ModuleType("vbench")
    package.VBench, package.__file__ = VBench, str(tmp_path / "vbench" / "__init__.py")
    monkeypatch.setitem(sys.modules, "vbench", package)
    return seen


def clips() -> Any:
    """Two clips of five frames 32 x 48 whose colours change slowly, so that coding changes them little."""
    time, y, x = np.meshgrid(np.linspace(0, 0.3, 5), np.linspace(0, 0.4, 32), np.linspace(0, 0.3, 48), indexing="ij")
    first = np.stack([time + x, y, x + y], axis=-1)
    return np.stack([first, 1 - first])


def stand_ins(folder: Path, count: int) -> Path:
    """A folder with files in place of videos, which VBench alone would read."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"clip-{i:03d}.mp4").touch()
    return folder


def test_written_files_hold_the_frames(adapter: Any, tmp_path: Path) -> None:
    import imageio.v3 as iio

    paths = adapter.write_videos(clips(), tmp_path, fps=4, names=["a walk", "a ride"])
    assert [p.name for p in paths] == ["a walk.mp4", "a ride.mp4"]
    for path, clip in zip(paths, clips(), strict=True):
        back = iio.imread(path, plugin="pyav")
        assert back.shape == (5, 32, 48, 3)
        assert np.abs(back / 255 - clip).mean() < 0.02
        meta = iio.immeta(path, plugin="pyav")
        assert (meta["codec"], meta["fps"]) == ("h264", 4.0)


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((2, 5, 32, 48), None, r"clips have shape \(2, 5, 32, 48\): must be"),
        ((2, 5, 31, 48, 3), None, "height and width even"),
        ((2, 5, 32, 48, 3), ["a"], "1 names for 2 clips"),
    ],
)
def test_what_cannot_be_written(adapter: Any, tmp_path: Path, shape: Any, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.write_videos(np.zeros(shape), tmp_path, names=names)


def test_scores_come_from_vbench(
    adapter: Any, weights: Path, calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = stand_ins(tmp_path / "videos", 2)
    adapter.main(["score", "--videos", str(videos), "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == pytest.approx({metric: 0.1 * i for i, metric in enumerate(adapter.METRICS)})
    assert calls == [
        {
            "device": "cpu",
            "full_info_dir": str(tmp_path / "vbench" / "VBench_full_info.json"),
            "videos": ["clip-000.mp4", "clip-001.mp4"],
            "local": True,
            "mode": "custom_input",
        }
    ]


def test_missing_weights_are_named(
    adapter: Any, weights: Path, calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_ins(tmp_path / "videos", 1)
    lost = weights / "raft_model/models/raft-things.pth"
    lost.unlink()
    with pytest.raises(adapter.VBenchMissing, match="weights are missing") as raised:
        adapter.score(tmp_path / "videos", tmp_path / "results")
    assert str(raised.value).splitlines()[1:] == [f"  {lost}"]
    assert not calls, "VBench would have tried to download it"
    assert adapter.score(tmp_path / "videos", tmp_path / "results", metrics=["imaging_quality"]) == {
        "imaging_quality": 0.0
    }
    with pytest.raises(SystemExit):
        adapter.main(["score", "--videos", str(tmp_path / "videos")])
    assert str(lost) in capsys.readouterr().err


def test_other_errors_say_what_to_do(adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"holds no \.mp4 file: write some first"):
        adapter.score(tmp_path, tmp_path)
    stand_ins(tmp_path, 1)
    with pytest.raises(ValueError, match="metrics charm are none of VBench's planning metrics: subject_consistency"):
        adapter.score(tmp_path, tmp_path, metrics=["charm"])
    monkeypatch.setitem(sys.modules, "vbench", None)
    with pytest.raises(adapter.VBenchMissing, match="make an environment of its own for it"):
        adapter.score(tmp_path, tmp_path)
