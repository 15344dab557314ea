"""The examples run, at sizes that take seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hero_fx

from .support.examples import example


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The examples turn gradients off for good, and compile the same class many times."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def benchmark(*arguments: str) -> None:
    example("benchmark").main(["--preset", "tiny", "--inner", "eager", "--threads", "1", "--rounds", "2", *arguments])


def test_benchmark_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["eager", "inductor", "hero", "forecast"]
    benchmark("--json", "--systems", ",".join(names))
    report = json.loads(capsys.readouterr().out)
    assert list(report["systems"]) == names
    assert (report["torch"], report["device"], report["threads"]) == (torch.__version__, "cpu", 1)
    for name, of in report["systems"].items():
        low, high = of["full_s_range"]
        assert 0 < low <= of["full_s"] <= high
        assert of["failed"] is None
        assert of["speedup_over_eager"] > 0
        assert of["speedup_over_inductor"] > 0
        assert ("cached_s" in of) == (name in ("hero", "forecast"))
    forecast, hero = report["systems"]["forecast"], report["systems"]["hero"]
    assert forecast["ratio_by_flops"] == 0 < forecast["ratio"] < hero["ratio"]
    assert 0 < hero["ratio_by_flops"] < 1 < hero["speedup_by_flops"] < 2
    assert hero["ratio_quotient"] == pytest.approx(hero["ratio"] / hero["ratio_by_flops"])
    assert hero["reached"] == pytest.approx(hero["speedup_over_inductor"] / hero["speedup_by_flops"])
    assert 0 < hero["host_us"] < 1e6 * hero["cached_s"] == pytest.approx(hero["host_us"] / hero["host_share"])
    assert hero["state_mb"] > 0


def test_benchmark_as_table(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("--systems", "hero-sampled,inductor")
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("2 layers of width 64, 72 image + 32 text tokens, batch 2, float32; cpu, 1 threads, torch ")
    assert [line.split()[0] for line in lines[-2:]] == ["hero-sampled", "inductor"]
    assert " .. " in lines[-1]


def test_benchmark_of_requests_in_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("--requests", "3", "--json")
    seconds = json.loads(capsys.readouterr().out)
    assert list(seconds) == [
        f"{of}, {way}" for of in ("inductor", "hero", "forecast") for way in ("in turn", "together")
    ]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in seconds.values())
    assert "over" in example("_benchmark_batch").table(seconds)


def test_benchmark_takes_in_turn_and_counts_no_first_round() -> None:
    module = example("benchmark")
    bench = module.Bench(module.PRESETS["tiny"], ["eager", "fora"], 2, "eager")
    order: list[str] = []
    for system in bench.systems:

        def call(name: str = system.name, run: Any = system.call, **inputs: Any) -> Any:
            order.append(name)
            return run(**inputs)

        system.call = call
    bench.run()
    first, second = ["eager"] * 2, ["fora"] * 2
    assert order == ["eager", "fora", *first, *second, *second, *first, *first, *second]
    eager, fora = bench.systems
    assert [len(s) for s in (eager.full, eager.cached, fora.full, fora.cached)] == [4, 0, 2, 2]
    stats = fora.backend.stats()
    assert (stats.full_steps, stats.cached_steps) == (4, 3)


def test_benchmark_goes_on_without_a_system_that_runs_out_of_memory() -> None:
    module = example("benchmark")
    bench = module.Bench(module.PRESETS["tiny"], ["hero", "eager"], 1, "eager")

    def call(**inputs: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 43 GB\nand more")

    bench.systems[0].call = call
    bench.run()
    report = {system.name: module.figures(system, {}) for system in bench.systems}
    assert report["hero"]["failed"] == "out of memory: tried to allocate 43 GB"
    assert report["eager"]["full_s"] > 0
    assert "hero   out of memory" in module.table({"systems": report})


def test_benchmark_options_of_every_system_are_allowed() -> None:
    for options in example("benchmark").SYSTEMS.values():
        hero_fx.backend(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--systems hero,nero", "--systems: nero is unknown; choose from eager, inductor, hero,"),
        ("--rounds 0", "--rounds 0: at least 1"),
        ("--requests 1", "--requests 1: at least 2"),
        ("--requests 2 --systems eager", "--systems eager: with --requests choose from inductor, hero, forecast"),
        ("--preset aether", "--preset aether needs a CUDA device"),
    ],
)
def test_benchmark_says_what_is_wrong(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        example("benchmark").main(arguments.split())
    assert message in capsys.readouterr().err


def test_benchmark_frees_the_state_of_each_system_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("benchmark")
    preset = replace(module.PRESETS["tiny"], dtype=torch.bfloat16)
    bench = module.Bench(preset, ["hero", "inductor"], 2, "eager")
    bench.preset = replace(preset, device="cuda")  # from here on it believes so
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    bench.run()
    for system in bench.systems:
        assert (system.step, system.peak) == (0, 5_000_000)
        if system.backend is not None:
            stats = system.backend.stats()
            # The compiling call, and three turns of full, full, cached.
            assert (stats.full_steps, stats.cached_steps, stats.state_bytes) == (7, 3, 0)
            assert (len(system.full), len(system.cached)) == (2, 2)
    report = {system.name: module.figures(system, {}) for system in bench.systems}
    assert report["hero"]["peak_mb"] == 5


def test_compile_cost_divides_by_the_first_system_of_the_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("compile_cost")
    caches: dict[str, list[str]] = {}
    seconds = {"inductor": iter((10.0, 1.0, 30.0, 3.0)), "hero": iter((15.0, 2.0, 60.0, 4.5))}

    def measured(preset: str, system: str, threads: int, cache: str) -> dict[str, float]:
        caches.setdefault(system, []).append(cache)
        wall = next(seconds[system])
        return {"wall_s": wall, "processor_s": 2 * wall, "passes_s": wall / 10, "graphs_from_cache": 0.0}

    monkeypatch.setattr(module, "in_process", measured)
    module.main(["--systems", "inductor,hero", "--rounds", "2", "--json"])
    hero = json.loads(capsys.readouterr().out)["systems"]["hero"]
    # The median of the rounds' ratios, not the ratio of the medians.
    assert hero["cold"]["wall_s_ratio"] == pytest.approx((1.5 + 2.0) / 2)
    assert hero["warm"]["processor_s_ratio"] == pytest.approx((2.0 + 1.5) / 2)
    assert hero["cold"]["wall_s"] == 37.5
    assert hero["cold"]["passes_share"] == pytest.approx((1.5 / 20 + 6.0 / 60) / 2)
    # Warm runs find what the cold run of the same round left, and nobody else's.
    for used in caches.values():
        assert used[0] == used[1] != used[2] == used[3]
    assert not set(caches["inductor"]) & set(caches["hero"])


def test_compile_cost_tells_our_passes_from_the_rest() -> None:
    module = example("compile_cost")
    bench = module.Bench(module.PRESETS["tiny"], ["hero"], rounds=1, inner="eager")
    passes = module.watched(bench.systems[0].backend)
    before, start = passes(), time.process_time()
    bench.step(bench.systems[0])
    assert before == 0 < passes() < time.process_time() - start
    report = {"hero": {"cold": dict.fromkeys(("wall_s", "processor_s", "wall_s_ratio", "processor_s_ratio"), 1.0)}}
    report["hero"]["cold"] |= {"passes_s": 4.25, "passes_share": 0.0625, "graphs_from_cache": 0.0}
    assert "4.25" in (line := module.table(report).splitlines()[-1])
    assert "0.062" in line


def test_compile_cost_runs_a_system_in_a_process_of_its_own(tmp_path: Path) -> None:
    module = example("compile_cost")
    with pytest.raises(RuntimeError, match="nonesuch: the measuring process failed"):
        module.in_process("tiny", "nonesuch", 1, str(tmp_path))


def test_compile_cost_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--systems", "hero,ghost"], "ghost"), (["--rounds", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            example("compile_cost").main(arguments)
        assert message in capsys.readouterr().err
