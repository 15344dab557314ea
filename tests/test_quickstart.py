"""The quickstart runs, at a size that takes seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .support.examples import example, world
from .support.tiny import randomized

model, pipeline = (world(name) for name in ("model", "pipeline"))


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The quickstart turns gradients off for good, and compiles a class that other tests compile too."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    transformer = randomized(model.world_transformer(2, 1))
    pipeline.WorldModelPipeline(transformer, model.world_scheduler()).save_pretrained(tmp_path / "weights")
    picture = tmp_path / "frames.png"
    arguments = [
        "--weights",
        str(tmp_path / "weights"),
        "--steps",
        "6",
        "--scenes",
        "1",
        "--rounds",
        "1",
        "--inner",
        "eager",
        "--picture",
        str(picture),
    ]
    example("quickstart").main(arguments)
    head, data = picture.read_bytes()[:24], picture.stat().st_size
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    assert width > 300
    assert height > 300
    assert data > 10_000
    out = capsys.readouterr().out
    assert "2 layers of width 32, planning of 1 scenes, guidance 3.0, 6 DDIM steps" in out
    rows = {cells[0]: cells[1:] for cells in (re.split(" {2,}", line.strip()) for line in out.splitlines())}
    assert rows["full + cached steps"] == ["6 + 0", "5 + 1"]  # 0 1 2 4 5 are full
    for name in ("rgb", "disparity", "raymap"):
        plain, fast = rows[f"{name}: relative L2 to full compute"]
        assert plain == "0"
        assert 0 < float(fast) < 0.2
    for name in (
        "seconds per full step (median)", "seconds per trajectory (median)", "speed-up of the trajectory",
        "speed-up that the FLOPs with attention allow", "GEMM TFLOPs", "feature state, MB",
        "to the truth: depth Abs Rel", "to the truth: camera turn error, degrees",
    ):  # fmt: skip
        assert len([float(cell) for cell in rows[name]]) == 2
    assert float(rows["rgb: PSNR to full compute, dB"][0]) > 15
    assert f"frames side by side: {picture}" in out
