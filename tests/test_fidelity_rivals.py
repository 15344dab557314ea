"""Rivals and calibrated plans of the fidelity bench, on a tiny untrained world model."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import hero_fx

from .support import fidelity
from .support.examples import FOLDER
from .support.fidelity import STEPS, command, rows

bench, weights = fidelity.bench, fidelity.weights
SHIPPED = str(FOLDER / "world/plans/planning.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--together", "--search", "8"], "--together, --search: of plans, and there are none without --plans; add it"),
        (["--closed-loop", "0"], "--closed-loop: of plans, and there are none without --plans; add it"),
        (["--plans", "--closed-loop", "-1"], "--closed-loop -1: at least 0"),
        (["--plans", "--choices"], "--plans: plans are rows of the main table; add main to --tables"),
        (["--plans", "--start-plan", "nowhere"], "--start-plan: plan='nowhere': there is no such file"),
        (
            ["--plans", "--start-plan", SHIPPED, "--intervals", "2", "--tasks", "planning"],
            "it has 19 full steps of 50, and what runs has 5 of 7: change --tasks or --intervals",
        ),
    ],
)
def test_options_that_no_plan_could_follow_are_errors(
    bench: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def rivals(bench: Any, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """What a run with a plan and with rivals writes, and the scenes that its plan is fitted to."""
    folder, seen = tmp_path_factory.mktemp("rivals"), list[int]()
    calibrating = sys.modules["world.calibrate"]
    draw = calibrating.sample_scenes

    def spy(seeds: list[int]) -> Any:
        seen.extend(seeds)
        return draw(seeds)

    more = ["--plans", "--search", "1", "--calibration-scenes", "1", "--rivals", "others", "--methods", "FORA"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "sample_scenes", spy)
        bench.main([*command(weights, folder), *more, "--intervals", "3"])
    return folder, seen


def test_rivals_and_plans(rivals: tuple[Path, list[int]]) -> None:
    found = rows(rivals[0])
    fewer = next(name for name in found if name.startswith("plain, "))
    evaluations = found["HERO, N=3"]["full_steps"]
    assert set(found) == {
        *("full compute", fewer, "HERO, N=3", "FORA, N=3", "plan, N=3", "growing window, N=3"),
        *(f"random schedule {seed}, N=3" for seed in range(3)),
        *(f"{name}, {evaluations} steps" for name in ("DPM-Solver++ 2M", "UniPC")),
    }
    fulls = {name: row["full_steps"] for name, row in found.items() if name.endswith("N=3")}
    assert set(fulls.values()) == {evaluations}
    assert found["plan, N=3"]["speed_total"] > found["HERO, N=3"]["speed_total"]
    distances = {name: row["metrics"]["rgb_l2"]["mean"] for name, row in found.items() if name != "full compute"}
    unlike = [distance for name, distance in distances.items() if not name.startswith("random")]
    assert len(set(unlike)) == len(unlike)  # of so few steps, random ones may be HERO's
    assert all(0 < distance < 2 for distance in distances.values()), distances


def test_a_plan_of_the_bench_is_fitted_to_training_scenes_and_kept(rivals: tuple[Path, list[int]]) -> None:
    from world.scenes import TRAINING  # type: ignore[import-not-found]

    folder, seen = rivals
    (path,) = (folder / "cache").glob("plan-*.safetensors")
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert hero_fx.Plan.load(path).timelines[0].full == rows(folder)["HERO, N=3"]["full_steps"]
    assert seen
    assert min(seen) >= TRAINING


@pytest.mark.parametrize(("full", "fits"), [(4.0, True), (5.0, False)])
def test_how_a_plan_is_calibrated(
    bench: Any, weights: Path, tmp_path: Path, full: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds in the closed loop are handed on; a plan to start with only where it has as many full steps."""
    plans, asked = sys.modules["_fidelity_plans"], dict[str, Any]()

    def calibrate(*args: Any, **options: Any) -> None:
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr(plans, "calibrate", calibrate)
    monkeypatch.setattr(plans, "_size", lambda path: (STEPS, full))
    (start := tmp_path / "start.safetensors").touch()
    how = plans.Calibrating(scenes=1, search=1, start=start, closed_loop=0)
    with pytest.raises(InterruptedError):
        plans.plan_for(weights, "planning", 4, how, tmp_path)
    assert asked["start"] == (start if fits else None)
    assert asked["closed_loop"] == 0


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_solvers_have_the_noise_levels_of_the_model(bench: Any, name: str) -> None:
    from world.model import world_scheduler  # type: ignore[import-not-found]

    usual = world_scheduler()
    theirs = sys.modules["_fidelity_rivals"].solver(name, usual)
    torch.testing.assert_close(theirs.alphas_cumprod, usual.alphas_cumprod.float(), atol=1e-6, rtol=1e-3)
    assert theirs.config.prediction_type == usual.config.prediction_type


def test_schedules_of_rivals(bench: Any) -> None:
    rivals = sys.modules["_fidelity_rivals"]
    for steps, full in ((30, 10), (30, 28), (50, 2), (7, 7), (9, 1)):
        for mask in (rivals.growing(steps, full), rivals.random_schedule(steps, full, 0)):
            assert (len(mask), sum(mask), mask[0]) == (steps, full, True)
    places = [step for step, is_full in enumerate(rivals.growing(30, 8)) if is_full]
    gaps = [b - a for a, b in pairwise(places)]
    assert gaps == sorted(gaps)
    assert places[-1] == 29
    assert rivals.random_schedule(30, 10, 0) != rivals.random_schedule(30, 10, 1)
