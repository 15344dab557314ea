"""The examples run, at sizes that take seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hero_fx

from .support import toys
from .support.examples import example, package

LATENT, CONDITION = package("_model").LATENT, package("_model").CONDITION


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The examples turn gradients off for good, and compile the same class many times."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class StandIn(nn.Module):
    """Called as the world model of the benchmark is, and compiled in a fraction of the time: toy blocks on latent pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(LATENT + CONDITION, toys.WIDTH), nn.Linear(toys.WIDTH, LATENT)
        self.blocks = nn.ModuleList(toys.Block() for _ in range(2))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        """[B, F, LATENT + CONDITION, h, w] -> [B, F, LATENT, h, w]"""
        pixels = hidden_states.movedim(2, -1)
        embedding = toys.sinusoid(timestep).to(pixels.dtype)[:, None] + encoder_hidden_states.mean()
        x = self.first(pixels.flatten(1, 3))
        for block in self.blocks:
            x = block(x, embedding)
        return (self.last(x).unflatten(1, pixels.shape[1:4]).movedim(-1, 2),)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark runs `StandIn`."""

    def small(setting: Any) -> StandIn:
        torch.manual_seed(0)
        return StandIn().to(setting.dtype).eval().requires_grad_(False)

    for module in ("_model", "_benchmark_batch"):
        monkeypatch.setattr(package(module), "world_model", small)


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


@pytest.mark.usefixtures("stand_in")
def test_benchmark_as_table(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("--systems", "eager,fora")
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("2 layers of width 64, 72 image + 32 text tokens, batch 2, float32; cpu, 1 threads, torch ")
    assert [line.split()[0] for line in lines[-2:]] == ["eager", "fora"]
    assert " .. " in lines[-1]


@pytest.mark.exhaustive
def test_benchmark_of_the_model_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of systems and requests in one call, of which the tests below have the stand-in."""
    benchmark("--systems", "hero-sampled,inductor")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["hero-sampled", "inductor"]
    check_requests(capsys)


@pytest.mark.usefixtures("stand_in")
def test_benchmark_of_requests_in_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    check_requests(capsys)


def check_requests(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("--requests", "3", "--json")
    seconds = json.loads(capsys.readouterr().out)
    assert list(seconds) == [
        f"{of}, {way}" for of in ("inductor", "hero", "forecast") for way in ("in turn", "together")
    ]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in seconds.values())
    assert "over" in example("_benchmark_batch").table(seconds)


@pytest.mark.usefixtures("stand_in")
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


@pytest.mark.usefixtures("stand_in")
def test_benchmark_frees_the_state_of_each_system_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("benchmark")
    preset = replace(module.PRESETS["tiny"], dtype=torch.bfloat16)
    bench = module.Bench(preset, ["fora", "eager"], 2, "eager")
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
    assert report["fora"]["peak_mb"] == 5


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


CHILD = """
import json, os, sys
if "nonesuch" in sys.argv:
    sys.exit("no such system")
print(json.dumps({"arguments": sys.argv[1:], "cache": os.environ["TORCHINDUCTOR_CACHE_DIR"]}))
"""


def test_compile_cost_runs_a_system_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the process is told, from a script in its place, which need not import torch; then what it does with that."""
    module = example("compile_cost")
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "child.py"))
    told: Any = module.in_process("tiny", "fora", 1, str(tmp_path))
    assert told["cache"] == str(tmp_path)
    with pytest.raises(RuntimeError, match="nonesuch: the measuring process failed\nno such system"):
        module.in_process("tiny", "nonesuch", 1, str(tmp_path))

    def without_inductor(preset: Any, names: list[str], rounds: int, inner: str) -> Any:
        assert inner == "inductor"
        return bench(preset, names, rounds, "eager")

    bench = module.Bench
    monkeypatch.setattr(module, "Bench", without_inductor)
    module.main(told["arguments"])
    measured = json.loads(capsys.readouterr().out)
    assert 0 < measured["passes_s"] < measured["processor_s"]
    assert measured["wall_s"] > 0


@pytest.mark.exhaustive
def test_the_measuring_process_of_compile_cost(tmp_path: Path) -> None:
    """Itself, with an empty cache of Inductor's."""
    module = example("compile_cost")
    with pytest.raises(RuntimeError, match="nonesuch: the measuring process failed"):
        module.in_process("tiny", "nonesuch", 1, str(tmp_path))
    measured = module.in_process("tiny", "fora", 1, str(tmp_path))
    assert 0 < measured["passes_s"] < measured["processor_s"]


def test_compile_cost_as_table() -> None:
    report = {"hero": {"cold": dict.fromkeys(("wall_s", "processor_s", "wall_s_ratio", "processor_s_ratio"), 1.0)}}
    report["hero"]["cold"] |= {"passes_s": 4.25, "passes_share": 0.0625, "graphs_from_cache": 0.0}
    assert "4.25" in (line := example("compile_cost").table(report).splitlines()[-1])
    assert "0.062" in line


def test_compile_cost_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--systems", "hero,ghost"], "ghost"), (["--rounds", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            example("compile_cost").main(arguments)
        assert message in capsys.readouterr().err
