"""The fidelity bench on a tiny untrained world model: what it runs, what it measures, what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hero_fx

from .support import fidelity
from .support.examples import example
from .support.fidelity import SCENES, STEPS, command, rows

bench, weights = fidelity.bench, fidelity.weights
METHODS = ("FORA", "TaylorSeer 2", "DuCa", "HERO", "HERO reuse")
"""One of each make: reuse, a second order, two kinds of cached steps, refreshed tokens; all of them are exhaustive."""
MAIN = ["--intervals", "2,4", "--methods", ",".join(METHODS)]


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


def test_a_setting_runs_what_torch_compile_would(bench: Any, weights: Path) -> None:
    """One trace for all settings gives the same latents, FLOPs and state as compiling each by itself."""
    from world.pipeline import WorldModelPipeline  # type: ignore[import-not-found]
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
    from world.model import world_scheduler  # type: ignore[import-not-found]

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
        (["--weights", "nowhere"], "there is no pipeline; train one with examples/world/train.py"),
    ],
)
def test_says_what_is_wrong(bench: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err
