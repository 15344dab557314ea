"""The fidelity bench on a tiny untrained world model: what it runs, what it measures, what it prints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hero_fx

from .support.examples import FOLDER, example
from .support.tiny import randomized

STEPS, SCENES = 7, 2
METHODS = ("FORA", "TaylorSeer 2", "DuCa", "HERO", "HERO reuse")
"""One of each make: reuse, a second order, two kinds of cached steps, refreshed tokens; all of them are exhaustive."""
MAIN = ["--intervals", "2,4", "--methods", ",".join(METHODS)]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """`examples/fidelity.py`, with short trajectories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        torch._dynamo.reset()
        module = example("fidelity")
        from world.pipeline import STEPS as steps  # type: ignore[import-not-found]

        for task in steps:
            patch.setitem(steps, task, STEPS)
        yield module
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def weights(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two layers, saved."""
    from world.model import world_scheduler, world_transformer  # type: ignore[import-not-found]
    from world.pipeline import WorldModelPipeline

    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = randomized(world_transformer(layers=2, heads=2, head=16))
    WorldModelPipeline(model, world_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(bench: Any, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run writes, its cache beside it: all tables, so that the model is traced once for them."""
    folder, tables = tmp_path_factory.mktemp("results"), "main,alpha,layers,choices,stability"
    arguments = [*command(weights, folder), *MAIN, "--tables", tables, "--only", "text,dtype of the state"]
    alphas = bench.alphas
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "alphas", lambda depth: alphas(depth)[::2])
        bench.main(arguments)
    return folder


def command(weights: Path, folder: Path) -> list[str]:
    # Of one scene each, as is the only one of converged sampling: another size would be traced anew.
    numbers = ["--scenes", str(SCENES), "--batch", "1", "--converged", "9", "--converged-scenes", "1"]
    folders = ["--weights", str(weights), "--results", str(folder), "--cache", str(folder / "cache")]
    return [*folders, *numbers, "--tasks", "reconstruction"]


def rows(results: Path) -> dict[str, Any]:
    found = json.loads((results / "fidelity.json").read_text())
    return {row["name"]: row for row in found["tasks"]["reconstruction"]["main"]}


def test_a_setting_runs_what_torch_compile_would(bench: Any, weights: Path) -> None:
    """One trace for all settings gives the same latents, FLOPs and state as compiling each by itself."""
    from world.pipeline import WorldModelPipeline
    from world.render import render  # type: ignore[import-not-found]
    from world.scenes import HELD_OUT, sample_scenes  # type: ignore[import-not-found]

    runner = bench.Runner(weights, None, batch=2)
    options: dict[str, Any] = {"interval": 3, "refresh_layers": 1}
    settings = [bench.Setting("hero", options), bench.Setting("fora", {"policy": "fora"}), bench.full()]
    with torch.no_grad():
        hero, fora, full = runner.sample("planning", settings, 2, "test")
    pipeline = WorldModelPipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline.transformer

    def alone() -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        rgb = render(sample_scenes([HELD_OUT, HELD_OUT + 1])).rgb
        latents: Tensor = pipeline(rgb, task="planning", generator=generators, output_type="latent").latents
        return latents

    torch.testing.assert_close(full, alone(), rtol=0, atol=1e-5)
    backend = hero_fx.backend(**options, num_steps=STEPS, inner="eager")
    pipeline.transformer = torch.compile(plain, backend=backend, fullgraph=True)
    torch.testing.assert_close(hero, alone(), rtol=0, atol=1e-5)
    assert (hero - full).abs().max() > 1e-3
    assert (fora - hero).abs().max() > 1e-3
    cost, stats = runner.cost("planning", settings[0]), backend.stats()
    assert (cost.steps, cost.full_steps) == (STEPS, stats.full_steps)
    assert cost.gemm == hero_fx.trajectory_flops(backend.graphs[0], backend.config, STEPS).gemm // 2
    assert cost.state == stats.state_bytes // 2
    assert runner.cost("planning", settings[2]).total == hero_fx.flops(backend.graphs[0].normal).total * STEPS // 2


def test_every_method_at_equal_full_steps(results: Path) -> None:
    found = rows(results)
    two, four = ([f"{method}, N={n}" for method in METHODS] for n in (2, 4))
    assert [name for name in found if not name.startswith("plain")] == ["full compute", *two, *four]
    assert {found[name]["full_steps"] for name in two} == {5}  # 0 1 2 4 6
    assert {found[name]["full_steps"] for name in four} == {4}  # 0 1 2 6
    for name, row in found.items():
        assert row["speed_gemm"] >= 1.0
        assert ("rgb_l2" in row["metrics"]) == (name != "full compute")
        for metric in ("rgb_converged", "abs_rel", "ate"):
            of = row["metrics"][metric]
            assert of["low"] <= of["mean"] <= of["high"]
            assert of["scenes"] == (1 if metric == "rgb_converged" else SCENES)
    assert 0 < found["HERO, N=2"]["metrics"]["rgb_l2"]["mean"] < found["HERO, N=4"]["metrics"]["rgb_l2"]["mean"] < 1


@pytest.mark.exhaustive
def test_all_methods(bench: Any, weights: Path, tmp_path: Path) -> None:
    bench.main([*command(weights, tmp_path), "--intervals", "4"])
    found = rows(tmp_path)
    assert [name for name in found if name.endswith("N=4")] == [f"{method}, N=4" for method in bench.METHODS]
    assert len({row["metrics"]["rgb_l2"]["mean"] for name, row in found.items() if name != "full compute"}) > 8


def test_the_rival_has_equal_flops(results: Path) -> None:
    found = rows(results)
    plain = [row for name, row in found.items() if name.startswith("plain")]
    step = found["full compute"]["gflops_total"] / STEPS
    for name in ("HERO, N=2", "HERO, N=4"):
        assert min(abs(row["gflops_total"] - found[name]["gflops_total"]) for row in plain) <= step / 2
    assert all(row["steps"] == row["full_steps"] for row in plain)


@pytest.mark.parametrize(("steps", "equal"), [(8, True), (20, True), (7, False)])
def test_the_rival_steps_along_its_table(bench: Any, steps: int, equal: bool) -> None:
    """diffusers' sampler where the steps divide 1000; elsewhere a clean sample and its noise stay on their path."""
    from world.model import world_scheduler

    usual = world_scheduler()
    exact = example("_fidelity_run").ExactSteps.from_config(usual.config)
    clean, noise = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double()
    ends = []
    for scheduler in (usual, exact):
        scheduler.set_timesteps(steps)
        sample = noise
        for t in scheduler.timesteps:
            share = scheduler.alphas_cumprod[int(t)].double()
            sample = scheduler.step(share.sqrt() * noise - (1 - share).sqrt() * clean, t, sample, return_dict=False)[0]
        ends.append(sample)
    assert torch.allclose(ends[0], ends[1], atol=1e-6) == equal
    torch.testing.assert_close(ends[1], clean, rtol=0, atol=1e-3)


def test_differences_are_paired(results: Path) -> None:
    found = rows(results)
    hero, fora = (found[f"{name}, N=2"]["metrics"]["raymap_l2"] for name in ("HERO", "FORA"))
    assert "less_hero" not in hero
    assert fora["less_hero"] == pytest.approx(fora["mean"] - hero["mean"])
    assert fora["less_hero_low"] <= fora["less_hero"] <= fora["less_hero_high"]


def test_reports(results: Path) -> None:
    tables = (results / "tables.md").read_text()
    assert f"## Reconstruction, {STEPS} steps, {SCENES} scenes" in tables
    found = rows(results)["HERO, N=4"]
    # At a glance: a column for each N.
    (line,) = [line for line in tables.splitlines() if re.match(r"\| HERO +\|", line)]
    assert f"({found['speed_total']:.2f})" in line.split("|")[3]
    lines = [line for line in tables.splitlines() if line.startswith("| HERO, N=4")]
    assert len(lines) == 3  # the summary, to full compute, to converged sampling and the truth
    value = found["metrics"]["rgb_l2"]["mean"]
    assert lines[0].split("|")[3].strip().startswith(f"{1000 * value:.1f} / ")
    assert lines[1].split("|")[3].strip().startswith(f"{value:.4f} ± ")
    assert (results / "reconstruction.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_second_run_samples_nothing_again(
    bench: Any, weights: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("sampled again")

    monkeypatch.setattr(bench.Runner, "_denoise", refuse)
    arguments = [*command(weights, tmp_path), "--cache", str(results / "cache")]
    bench.main([*arguments, *MAIN, "--json"])
    found = json.loads(capsys.readouterr().out)["tasks"]["reconstruction"]["main"]
    assert {row["name"]: row for row in found} == rows(results) == rows(tmp_path)
    with pytest.raises(AssertionError, match="sampled again"):
        bench.main([*arguments, "--intervals", "3"])


def test_ablations_and_choices(results: Path) -> None:
    found = json.loads((results / "fidelity.json").read_text())["tasks"]["reconstruction"]
    assert [row["name"] for row in found["alpha"]] == [f"α = {k}/6" for k in (5, 3, 1)]
    flops = [row["gflops_gemm"] for row in found["alpha"]]
    assert flops == sorted(flops, reverse=True)
    assert [row["name"] for row in found["layers"]] == ["M = 0 of 2", "M = 1 of 2", "M = 2 of 2"]
    chosen = {(row["choice"], row["name"]): row for row in found["choices"]["2"]}
    assert list(chosen)[:2] == [("default", "(default)"), ("text", "live")]
    default, halved = chosen["default", "(default)"], chosen["dtype of the state", "bfloat16"]
    assert halved["state_mb"] == pytest.approx(default["state_mb"] / 2)
    for features in ("update", "hidden"):
        assert sorted(found["stability"][features]["score"]) == [0.0, 1.0]  # of two layers
        assert (results / f"stability-{features}-reconstruction.png").exists()
    tables = (results / "tables.md").read_text()
    assert "dtype of the state" in tables
    assert f"updates of the residual stream, {STEPS} steps, 1 series" in tables


def test_all_settings_are_allowed(bench: Any) -> None:
    settings = [*bench.methods(3), *bench.alphas(16), *bench.boundaries(16), *[s for _, s in bench.choices(3, None)]]
    for setting in settings:
        hero_fx.backend(**setting.options, num_steps=30)
    assert [s.options["refresh_layers"] for s in bench.boundaries(42)] == [0, 6, 11, 16, 21, 26, 31, 36, 42]
    assert {s.options["refresh_layers"] for s in bench.alphas(42)} == {16}


def test_measures_nothing_wrong_in_the_truth_itself(bench: Any, weights: Path) -> None:
    truth = bench.Runner(weights, None).truth(2)
    other = truth.latents.flip(0)
    found = bench.measure(truth.latents, other, truth.latents[:1], truth)
    assert found["abs_rel"].max() < 1e-5
    assert found["delta_1"].min() == 1.0
    for name in ("ate", "rpe_trans", "rpe_rot"):
        assert found[name].max() < 1e-3
    assert found["converged"].tolist() == [0.0]
    assert found["truth_psnr"].min() > 100
    for name, channels in (("rgb", slice(0, 12)), ("disparity", slice(12, 16)), ("raymap", slice(16, 22))):
        a, b = (x[:, :, channels].flatten(1) for x in (truth.latents, other))
        assert found[f"{name}_l2"].tolist() == pytest.approx(((a - b).norm(dim=1) / b.norm(dim=1)).tolist(), rel=1e-5)
        assert np.all(found[f"{name}_ssim"] < 1)


def test_marks_say_what_is_surely_better(bench: Any) -> None:
    report = example("_fidelity_report")
    of = {"mean": 0.5, "low": 0.4, "high": 0.6, "less_hero_low": 0.1, "less_hero_high": 0.2}
    assert report.cell("rgb_l2", of) == "0.5000 ± 0.1000 ▼"
    assert report.cell("rgb_psnr", of) == "0.5 ± 0.1 ▲"
    assert report.cell("rgb_l2", {**of, "less_hero_low": -0.1}) == "0.5000 ± 0.1000"
    assert report.cell("delta_1", {**of, "less_hero_low": -0.3, "less_hero_high": -0.1}) == "0.5000 ± 0.1000 ▼"
    assert report.cell("ate", None) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "cooking"], "cooking is unknown; choose from planning, reconstruction"),
        (["--tables", "main,beta"], "beta is unknown; choose from main, alpha, layers, choices, stability"),
        (["--scenes", "0"], "at least 1"),
        (["--together"], "there are none without --plans; add it"),
        (["--closed-loop", "0"], "--closed-loop: of plans, and there are none without --plans; add it"),
        (["--plans", "--start-plan", "nowhere"], "there is no such file"),
        (
            [
                "--plans",
                "--start-plan",
                str(FOLDER / "world/plans/planning.safetensors"),
                "--intervals",
                "2",
                "--tasks",
                "planning",
            ],
            "it has 19 full steps of 50, and what runs has 5 of 7: change --tasks or --intervals",
        ),
        (["--weights", "nowhere"], "there is no pipeline; train one with examples/world/train.py"),
    ],
)
def test_says_what_is_wrong(bench: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    from world.scenes import TRAINING

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
    from world.model import world_scheduler

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
