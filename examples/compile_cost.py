"""What compiling both step graphs costs: time to first output against plain `torch.compile`, cold and warm.

    python examples/compile_cost.py [--preset small] [--systems inductor,hero,lean,forecast] [--rounds 3] [--threads 2] [--json]

Every measurement is a process of its own, systems in turn: first with an empty Inductor cache (cold), then again with
what that left (warm: Inductor's FX graph cache and its compiled kernels). Seconds are those of the first call alone:
Dynamo, our passes, Inductor for each graph, one full step. Beside the wall clock stands the processor time of the process
and of the compilers it started, which a busy machine does not stretch as much, and that of our passes alone: from Dynamo's
graph to the step graphs, none of which is Inductor's. `forecast` follows a calibrated plan: its cached step is a few sums, so
that there is one large graph, as in plain `torch.compile`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import hero_fx
from benchmark import PRESETS, SYSTEMS, Bench


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def watched(backend: hero_fx.Backend) -> Callable[[], float]:
    """The processor seconds that a backend has spent on making step graphs, to be asked for later."""
    make, spent = backend._steps, [0.0]

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        made = make(*arguments)
        spent[0] += time.process_time() - start
        return made

    backend._steps = timed
    return lambda: spent[0]


def first_output(preset: str, system: str) -> dict[str, float]:
    """Seconds of the first call of a system in this process, and how many Inductor graphs came from its cache."""
    bench = Bench(PRESETS[preset], [system], rounds=1, inner="inductor")
    backend = bench.systems[0].backend
    passes = watched(backend) if backend is not None else lambda: 0.0
    clock, used = time.perf_counter(), processor_seconds()
    bench.step(bench.systems[0])
    result = {"wall_s": time.perf_counter() - clock, "processor_s": processor_seconds() - used}
    hits: int = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
    return result | {"passes_s": passes(), "graphs_from_cache": float(hits)}


def in_process(preset: str, system: str, threads: int, cache: str) -> dict[str, float]:
    """`first_output` in a fresh process whose Inductor cache is the folder `cache`."""
    command = [sys.executable, __file__, "--preset", preset, "--systems", system, "--threads", str(threads), "--child"]
    # Compilers as children of the process: a pool's workers outlive the call and their time could not be told apart.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{system}: the measuring process failed\n{ran.stderr}")
    result: dict[str, float] = json.loads(ran.stdout)
    return result


def measure(preset: str, systems: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Per system and cache state the medians, and the medians of the ratios to the first system of the same round."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = {s: {"cold": [], "warm": []} for s in systems}
    with tqdm(total=2 * rounds * len(systems), leave=False) as bar:
        for number in range(rounds):
            for system in systems[number % len(systems) :] + systems[: number % len(systems)]:
                with tempfile.TemporaryDirectory() as cache:
                    for state in ("cold", "warm"):
                        bar.set_description(f"round {number}, {system}, {state}")
                        runs[system][state].append(in_process(preset, system, threads, cache))
                        bar.update()
    report: dict[str, Any] = {}
    for system, states in runs.items():
        report[system] = {}
        for state, measured in states.items():
            base = runs[systems[0]][state]
            cell = {key: median(run[key] for run in measured) for key in measured[0]}
            for key in ("wall_s", "processor_s"):
                cell[f"{key}_ratio"] = median(run[key] / b[key] for run, b in zip(measured, base, strict=True))
            cell["passes_share"] = median(
                run["passes_s"] / b["processor_s"] for run, b in zip(measured, base, strict=True)
            )
            report[system][state] = cell
    return report


def table(report: dict[str, Any]) -> str:
    """One row per system and cache state."""
    rows = [
        [
            system,
            state,
            *(f"{of[key]:.1f}" for key in ("wall_s", "processor_s")),
            *(f"{of[f'{key}_ratio']:.2f}" for key in ("wall_s", "processor_s")),
            f"{of['passes_s']:.2f}",
            f"{of['passes_share']:.3f}",
            f"{of['graphs_from_cache']:.0f}",
        ]
        for system, states in report.items()
        for state, of in states.items()
    ]
    first = next(iter(report))
    heads = [
        "",
        "cache",
        "first\noutput, s",
        "processor, s",
        f"over\n{first}",
        f"processor\nover {first}",
        "our\npasses, s",
        f"of {first}'s\nprocessor",
        "from\ncache",
    ]
    return tabulate(rows, headers=heads, disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    """Measures, and prints the table or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument(
        "--systems", default="inductor,hero,lean,forecast", help="the first one is what the others are divided by"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    systems = arguments.systems.split(",")
    if unknown := [name for name in systems if name not in SYSTEMS]:
        parser.error(f"--systems: {', '.join(unknown)} unknown; allowed are {', '.join(SYSTEMS)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds} must be at least 1")
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.child:
        print(json.dumps(first_output(arguments.preset, systems[0])))
        return
    report = measure(arguments.preset, systems, arguments.rounds, arguments.threads)
    if arguments.json:
        about = {name: getattr(arguments, name) for name in ("preset", "rounds", "threads")}
        print(json.dumps({"torch": torch.__version__, **about, "systems": report}, indent=1))
        return
    print(f"{arguments.preset}: first output, medians of {arguments.rounds} rounds, {arguments.threads} threads")
    print(table(report))


if __name__ == "__main__":
    main()
