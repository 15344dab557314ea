"""Eager, plain torch.compile and the caching policies side by side: seconds, FLOPs, state and host overhead.

    python examples/benchmark.py [--preset small|aether] [--systems eager,inductor,hero] [--rounds 5] [--json]
    python examples/benchmark.py --requests 4        # requests at steps of their own, in turn and in one call

All systems run one Aether-shaped model with random weights, in one process and in turn: a round takes one full and one
cached step of every system, so that a machine that slows down slows all of them. Each compiled model is driven as any
denoising loop would drive it, by its timesteps, along a trajectory whose schedule is full, full, cached, full, cached, ...
The compiling call and the first round are not counted. On a GPU a system's feature state is freed after its turn, because
that of all systems would not fit together.

"Reached" compares the speed-up of a 50-step trajectory at N=2 (27 full steps), put together from the medians, with the one
that the FLOPs with attention allow. Host overhead is the time that a cached call spends in hero_fx outside of the step
graph: reading the timestep, the guard, finding the state, drawing tokens. What compiling costs is `compile_cost.py`'s.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import _benchmark_batch
import hero_fx
from _model import CONDITION, LATENT, Setting, rotary, world_model
from hero_fx.passes.emit import value_of
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.runtime.filling import Selections
from hero_fx.runtime.planned import planned_for
from hero_fx.runtime.state import StateStore
from hero_fx.runtime.stepper import Stepper
from hero_fx.runtime.weights import Weights

SYSTEMS: dict[str, dict[str, Any]] = {
    "eager": {},
    "inductor": {},
    "hero": {},
    "hero-reuse": {"unsampled": "reuse"},
    "hero-sampled": {"keys": "sampled"},
    "lean": {"policy": "lean"},
    "fora": {"policy": "fora"},
    "taylorseer": {"policy": "taylorseer"},
    "toca": {"policy": "toca"},
    "duca": {"policy": "duca"},
    "forecast": {},
}
"""Options of `hero_fx.backend`, by the system's name; `eager` and `inductor` run without hero_fx, `forecast` follows a plan."""
STEPS = 50
"""Of the trajectory that speed-ups are worked out for; its schedule is "uniform" at N=2."""
PRESETS = {
    "tiny": Setting(2, 1, (3, 8, 12)),
    "small": Setting(12, 8, (7, 24, 36)),
    "aether": Setting(42, 48, (11, 60, 90), (226, 4096), time_width=512, device="cuda", dtype=torch.bfloat16),
}


@dataclass
class System:
    """One way to run the model, and what was measured of it."""

    name: str
    call: Callable[..., Any]
    backend: hero_fx.Backend | None = None
    step: int = 0
    """Steps of the present trajectory that are done."""
    first: float = 0.0
    """Seconds to the first output, compilation included."""
    full: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    peak: int = 0
    """Bytes allocated on the GPU during a turn, at most."""
    failed: str | None = None


def extrapolated(mask: tuple[bool, ...], times: Tensor) -> hero_fx.Plan:
    """A plan with three past outputs and two latents, whose coefficients extrapolate linearly: what it costs is the same."""
    theta, fulls = torch.zeros(len(mask), 5, 1, 1, LATENT, 1, 1), [0]
    for step, full in enumerate(mask):
        if full:
            fulls.append(step)
        elif fulls[-2] < fulls[-1]:
            theta[step, 1] = (step - fulls[-1]) / (fulls[-1] - fulls[-2])
    line = hero_fx.Timeline(schedule=mask, timesteps=tuple(map(float, times.tolist())), coefficients={"out0": theta})
    rule = OutputRule(index=0, axis=2, latent="hidden_states")
    return hero_fx.Plan(policy="forecast", timelines=(line,), outputs=(rule,))


def of_trajectory(config: hero_fx.Config) -> hero_fx.Config:
    """The options for a trajectory of `STEPS` steps, every second one full."""
    if config.plan is None:
        return replace(config, schedule="uniform", interval=2, num_steps=STEPS)
    even = hero_fx.Config(interval=2, num_steps=STEPS).make_schedule()
    plan = extrapolated(tuple(map(even.is_full, range(STEPS))), torch.linspace(999, 19, STEPS).round())
    return replace(config, plan=plan, schedule="uniform", num_steps=None)


class Bench:
    """The model, its inputs, and the systems that run it."""

    def __init__(self, preset: Setting, names: list[str], rounds: int, inner: str) -> None:
        self.preset, self.rounds = preset, rounds
        self._wait = torch.cuda.synchronize if preset.device == "cuda" else lambda: None
        self.mask = (True, *(True, False) * (rounds + 1))
        self.times = torch.linspace(999, 19, len(self.mask)).round().long().to(preset.device)
        model = world_model(preset)
        frames, height, width = preset.size
        generator = torch.Generator().manual_seed(2)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(preset.device, preset.dtype)

        self.inputs = {
            "hidden_states": noise(2, frames, LATENT + CONDITION, height, width),
            "encoder_hidden_states": noise(2, *preset.text),
            "image_rotary_emb": rotary(preset),
        }
        self.systems = [self._system(name, model, inner) for name in names]

    def _system(self, name: str, model: Any, inner: str) -> System:
        if name == "eager":
            return System(name, model)
        if name == "inductor":
            return System(name, torch.compile(model, backend=inner, fullgraph=True))
        options = SYSTEMS[name]
        if name == "forecast":
            options = {"plan": extrapolated(self.mask, self.times)}
        backend = hero_fx.backend(schedule=self.mask, inner=inner, **options)
        return System(name, torch.compile(model, backend=backend, fullgraph=True), backend)

    def run(self) -> None:
        """Compiles every system, then measures `rounds` rounds of turns."""
        with tqdm(total=len(self.systems) * (self.rounds + 2), leave=False) as bar:
            for system in self.systems:
                bar.set_description(f"{system.name}: first call")
                with self._out_of_memory(system):
                    system.first = self.step(system)
                    self._leave(system)
                bar.update()
            with torch.compiler.set_stance("fail_on_recompile"):
                for number in range(self.rounds + 1):
                    first = number % len(self.systems)
                    for system in self.systems[first:] + self.systems[:first]:
                        bar.set_description(f"round {number}, {system.name}")
                        if system.failed is None:
                            with self._out_of_memory(system):
                                self._turn(system, counts=number > 0)
                        bar.update()

    def _turn(self, system: System, *, counts: bool) -> None:
        """One full and one cached step (of plain systems two full ones), after the start of a trajectory if need be."""
        if self.preset.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if system.step == 0:
            self.step(system)
        full, cached = self.step(system), self.step(system)
        if self.preset.device == "cuda":
            system.peak = max(system.peak, torch.cuda.max_memory_allocated())
        self._leave(system)
        if counts:
            system.full.append(full)
            (system.full if system.backend is None else system.cached).append(cached)

    def step(self, system: System) -> float:
        """Seconds of the trajectory's next step."""
        t = self.times[system.step].expand(2)
        system.step += 1
        self._wait()
        start = time.perf_counter()
        system.call(**self.inputs, timestep=t, return_dict=False)
        self._wait()
        return time.perf_counter() - start

    def _leave(self, system: System) -> None:
        """Ends a turn: the trajectory goes on at the next one, or, on a GPU, makes room and starts anew."""
        if self.preset.device == "cuda":
            system.step = 0
            if system.backend is not None:
                system.backend.reset()

    @contextmanager
    def _out_of_memory(self, system: System) -> Iterator[None]:
        """Takes a system out of the race where memory does not suffice for it."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            system.failed = f"out of memory: {str(error).splitlines()[0]}"
            if system.backend is not None:
                system.backend.reset()
            torch.cuda.empty_cache()


def host_seconds(stepper: Stepper, config: hero_fx.Config) -> float:
    """Median seconds of a cached call whose step graphs do nothing, over a trajectory; neither state nor inputs take memory."""
    assert stepper.graphs is not None
    idle = copy.copy(stepper)
    idle.full = replace(stepper.full, run=lambda *inputs: None)
    idle.cached = tuple(replace(step, run=lambda *inputs: None) for step in stepper.cached)
    idle.store = StateStore(
        [replace(s, device=torch.device("meta")) for s in stepper.store.specs], stepper.store.new_tracker
    )
    idle.weights = Weights(stepper.inputs.weights, idle.store.drop_model)
    if stepper.selections is not None:
        idle.selections = Selections(stepper.selections.sampler, stepper.selections.device)
    idle.follow(config.schedule_of, planned_for(config))
    schedule, seconds = config.make_schedule(), []
    values = [value_of(node) for node in stepper.graphs.normal.graph.find_nodes(op="placeholder")]
    inputs = [torch.empty_like(v, device="meta") if isinstance(v, torch.Tensor) else v for v in values]
    for step, t in enumerate(torch.linspace(999, 19, STEPS).round().long().to(stepper.full.device)):
        inputs[stepper.inputs.timestep] = t.expand(2)
        start = time.perf_counter()
        idle(*inputs)
        if not schedule.is_full(step):
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def figures(system: System, plain: dict[str, float]) -> dict[str, Any]:
    """What is reported of a system; `plain`: median seconds of a step of each plain system that ran."""
    result: dict[str, Any] = {"failed": system.failed, "first_output_s": system.first}
    if system.failed is not None:
        return result
    full = median(system.full)
    result |= {"full_s": full, "full_s_range": [min(system.full), max(system.full)]}
    if system.peak:
        result["peak_mb"] = system.peak / 1e6
    trajectory = STEPS * full
    if system.backend is not None:
        backend, steps = system.backend, system.backend.graphs[-1]
        config = of_trajectory(backend.config)
        policy = config.make_policy()
        assert policy is not None
        kinds = hero_fx.step_kinds(config, policy, STEPS)
        by_flops = hero_fx.flops(steps.cached[policy.kind(1)]).total / hero_fx.flops(steps.full).total
        # Full and cached step of one round ran one after the other: their ratio does not see the machine drift.
        cached, ratios = median(system.cached), [c / f for c, f in zip(system.cached, system.full, strict=True)]
        trajectory = kinds.count(None) * full + (STEPS - kinds.count(None)) * cached
        allowed = STEPS * hero_fx.flops(steps.normal).total / hero_fx.trajectory_flops(steps, config, STEPS).total
        host = host_seconds(backend.steppers[-1], config)
        result |= {
            "cached_s": cached,
            "cached_s_range": [min(system.cached), max(system.cached)],
            "ratio": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "ratio_by_flops": by_flops,
            "speedup_by_flops": allowed,
            "state_mb": steps.state_bytes / 1e6,
            "host_us": 1e6 * host,
            "host_share": host / cached,
        }
    result |= {f"speedup_over_{name}": STEPS * seconds / trajectory for name, seconds in plain.items()}
    if result.get("ratio_by_flops"):  # a forecast has no FLOPs of matrix products to compare with
        result["ratio_quotient"] = result["ratio"] / result["ratio_by_flops"]
    if system.backend is not None and "inductor" in plain:
        result["reached"] = result["speedup_over_inductor"] / result["speedup_by_flops"]
    return result


def table(report: dict[str, Any]) -> str:
    """The report, one row per system; seconds and ratios as median (lowest .. highest)."""
    columns = [
        ("first\noutput, s", "first_output_s", ".1f"), ("full step, s", "full_s", ".4g"),
        ("cached step, s", "cached_s", ".4g"), ("cached / full", "ratio", ".3f"),
        ("by\nFLOPs", "ratio_by_flops", ".3f"), ("quotient", "ratio_quotient", ".2f"),
        *[(f"{STEPS} steps\nover {name}", f"speedup_over_{name}", ".2f") for name in ("eager", "inductor")],
        ("by\nFLOPs", "speedup_by_flops", ".2f"), ("reached", "reached", ".1%"), ("state,\nMB", "state_mb", ".1f"),
        ("host,\nus", "host_us", ".0f"), ("of a\ncached step", "host_share", ".2%"), ("peak,\nMB", "peak_mb", ".0f"),
    ]  # fmt: skip
    columns = [column for column in columns if any(column[1] in of for of in report["systems"].values())]
    rows = []
    for name, of in report["systems"].items():
        cells = [f"{of[key]:{form}}" if key in of else "" for _, key, form in columns]
        for i, (_, key, form) in enumerate(columns):
            if f"{key}_range" in of:
                cells[i] += f" ({' .. '.join(f'{value:{form}}' for value in of[f'{key}_range'])})"
        rows.append([name, *cells] if of["failed"] is None else [name, of["failed"]])
    return tabulate(rows, headers=["", *[title for title, _, _ in columns]], disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    """Measures, and prints the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--requests", type=int, help="2 or more: measures hero_fx.batch")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    names, preset = arguments.systems.split(","), PRESETS[arguments.preset]
    if unknown := [name for name in names if name not in SYSTEMS]:
        parser.error(f"--systems: {', '.join(unknown)} is unknown; choose from {', '.join(SYSTEMS)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least 1")
    if arguments.requests is not None and arguments.requests < 2:
        parser.error(f"--requests {arguments.requests}: at least 2")
    batched = [name for name in _benchmark_batch.SYSTEMS if name in names]
    if arguments.requests is not None and not batched:
        parser.error(
            f"--systems {arguments.systems}: with --requests choose from {', '.join(_benchmark_batch.SYSTEMS)}"
        )
    if preset.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--preset {arguments.preset} needs a CUDA device, and torch finds none; on a CPU: --preset small")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.requests is not None:
        with torch.no_grad():
            seconds = _benchmark_batch.throughput(
                preset, batched, extrapolated, arguments.requests, arguments.rounds, arguments.inner
            )
        print(json.dumps(seconds, indent=1) if arguments.json else _benchmark_batch.table(seconds))
        return
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        bench = Bench(preset, names, arguments.rounds, arguments.inner)
        bench.run()
        plain = {s.name: median(s.full) for s in bench.systems if s.backend is None and s.full}
        report = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if preset.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            **{name: getattr(arguments, name) for name in ("preset", "inner", "rounds")},
            "systems": {system.name: figures(system, plain) for system in bench.systems},
        }
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{preset}; {report['device']}, {report['threads']} threads, torch {torch.__version__}")
    print(f"median (lowest .. highest) of {arguments.rounds} rounds, inner compiler: {arguments.inner}\n")
    print(table(report))


if __name__ == "__main__":
    main()
