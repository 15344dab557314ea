"""The quickstart runs, at a size that takes seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import StatisticsError
from typing import Any

import pytest
import torch
from PIL import GifImagePlugin, Image

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule

from .support.examples import FOLDER, example, package, world
from .support.tiny import randomized

model, pipeline = (world(name) for name in ("model", "pipeline"))


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The quickstart turns gradients off for good, and compiles a class that other tests compile too."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def saved(folder: Path) -> Any:
    """A tiny world model; its scheduler."""
    torch.manual_seed(0)
    pipe = pipeline.WorldModelPipeline(randomized(model.world_transformer(2, 1)), model.world_scheduler())
    pipe.save_pretrained(folder)
    return pipe.scheduler


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = saved(tmp_path / "weights")
    plan = tmp_path / "plan.safetensors"
    reusing(scheduler, [True, True, False, True, False, True]).save(plan)
    picture = tmp_path / "frames.png"
    arguments = {
        "--weights": tmp_path / "weights", "--plan": plan, "--picture": picture, "--steps": 6, "--scenes": 1, "--rounds": 1,
        "--inner": "eager",
    }  # fmt: skip
    monkeypatch.syspath_prepend(FOLDER)
    example("quickstart").main([str(part) for pair in arguments.items() for part in pair])
    with Image.open(picture) as image:
        assert min(image.size) > 300
    with Image.open(picture.with_suffix(".gif")) as image:
        assert isinstance(image, GifImagePlugin.GifImageFile)
        assert (image.n_frames, image.size) == (10, (4 * 128, 128 + 18))  # to and fro; truth and three ways
    out = capsys.readouterr().out
    assert "2 layers of width 32, planning of 1 scenes, guidance 3.0, 6 DDIM steps" in out
    rows = {cells[0]: cells[1:] for cells in (re.split(" {2,}", line.strip()) for line in out.splitlines())}
    assert rows["torch.compile"] == ["HERO", "plan"]  # the head
    assert rows["full + cached steps"] == ["6 + 0", "5 + 1", "4 + 2"]  # HERO: 0 1 2 4 5 are full
    assert rows["feature state, MB"][0] == "0.0"
    assert all(float(cell) > 0 for cell in rows["feature state, MB"][1:])
    for name in ("rgb", "disparity", "raymap"):
        plain, hero, planned = map(float, rows[f"{name}: relative L2 to full compute"])
        assert plain == 0
        assert 0 < hero < 0.2
        assert 0 < planned < 0.5
    for name in (
        "seconds per full step (median)", "seconds per trajectory (median)", "speed-up of the trajectory",
        "speed-up that the FLOPs with attention allow", "GEMM TFLOPs", "feature state, MB",
        "to the truth: depth Abs Rel", "to the truth: camera turn error, degrees",
    ):  # fmt: skip
        assert len([float(cell) for cell in rows[name]]) == 3
    assert float(rows["rgb: PSNR to full compute, dB"][0]) > 15
    assert f"frames side by side: {picture}" in out


def test_a_way_apart_is_the_way_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own compiles and denoises as this one does; its errors arrive."""
    saved(tmp_path)
    ways = package("_quickstart_processes")
    settings = ways.Settings(tmp_path, task="planning", steps=6, scenes=1, inner="eager")
    hero = {"interval": 2, "num_steps": 6}
    outcomes = []
    monkeypatch.syspath_prepend(FOLDER)
    for made in (ways.Apart, ways.Here):
        way = made("HERO", settings, hero)
        assert way.ask("first_call").result() > 0
        with pytest.raises(StatisticsError):  # nothing has been measured
            way.ask("outcome").result()
        for _ in range(2):
            way.ask("denoise").result()
        outcomes.append(way.ask("outcome").result())
        way.close()
    apart, here = outcomes
    assert torch.equal(apart.output.latents, here.output.latents)
    assert (apart.counted, apart.whole, apart.spent, apart.state_bytes) == (
        here.counted,
        here.whole,
        here.spent,
        here.state_bytes,
    )
    assert apart.by_kind.keys() == here.by_kind.keys() == {None, 0}
    assert 0 < apart.by_kind[0] < apart.seconds


@pytest.mark.parametrize("option", ["--steps", "--interval", "--scenes", "--rounds"])
def test_counts_below_one_are_errors(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("quickstart").main([option, "0"])
    assert f"{option} 0: at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "said"), [("--weights", "no model_index.json"), ("--plan", "no such file")])
def test_files_that_are_not_there_are_errors(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("quickstart").main([option, "nowhere"])
    assert re.search(f"{option} nowhere: .*{said}", capsys.readouterr().err)


def reusing(scheduler: Any, schedule: list[bool]) -> hero_fx.Plan:
    """Cached steps return the last output, for the steps of a scheduler."""
    scheduler.set_timesteps(len(schedule))
    line = hero_fx.Timeline(
        schedule=tuple(schedule),
        timesteps=tuple(map(float, scheduler.timesteps)),
        coefficients={"out0": torch.zeros(len(schedule), 5, 1)},
    )
    return hero_fx.Plan(policy="forecast", timelines=(line,), outputs=(OutputRule(index=0, axis=None, history=2),))


@pytest.mark.parametrize("task", model.TASKS)
def test_shipped_plans(task: str) -> None:
    """They are for the shipped weights and the task's steps, and say what they were measured to cost."""
    plan = hero_fx.Plan.load(world("calibrate").PLANS / f"{task}.safetensors")
    (line,) = plan.timelines
    full = sum(line.levels) / plan.parts
    assert (line.num_steps, full) == (pipeline.STEPS[task], world("calibrate").FULL[task])
    assert plan.parts == (2 if pipeline.GUIDANCE[task] > 1 else 1)
    assert plan.model is not None
    assert (
        plan.model.config["num_layers"]
        == pipeline.WorldModelPipeline.from_pretrained(pipeline.WEIGHTS).transformer.config.num_layers
    )
    assert line.speed > 2.2
    assert set(line.error) == {"rgb", "disparity", "raymap"}
