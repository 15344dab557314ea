"""Runs the pipeline with one compiled transformer after another, and measures: steps, wall clock, memory, FLOPs."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import hero_fx
from _systems import System, compiled_with, plain_system

PAPER = {"unsampled": "reuse", "keys": "sampled", "schedule": "toca", "refresh_layers": 0.5, "refresh_ratio": 1 / 6}
"""HERO with the settings that the paper's FLOPs tell (M is half of the layers: 21 of Aether's 42)."""
SYSTEMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"policy": "full"},
    "hero": {},
    "hero-paper": PAPER,
    "lean": {"policy": "lean"},
    "fora": {"policy": "fora"},
    "taylorseer": {"policy": "taylorseer"},
    "toca": {"policy": "toca"},
    "duca": {"policy": "duca"},
}
"""Options of `hero_fx.backend` by name; `plain` is torch.compile without hero_fx."""
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Settings:
    """How systems are compiled and run."""

    steps: int
    interval: int = 2
    inner: str = "inductor"
    plan: Path | None = None
    attention: str | None = None
    """A key of `ATTENTION`: that kernel or an error; None lets PyTorch choose."""
    offload: bool = False
    device: str = "cpu"
    seed: int = 42


class Runner:
    """A pipeline whose transformer is exchanged for one compiled system after another."""

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self.pipe, self.settings, self.model = pipe, settings, pipe.transformer

    def system(self, name: str) -> System:
        """A system of `SYSTEMS`, or `"plan"`."""
        if name == "plain":
            system = plain_system(self.model, self.settings.inner)
            system.name = name
            return system
        if name == "plan":
            return compiled_with(self.model, name, inner=self.settings.inner, plan=self.settings.plan)
        return self.with_options(name, interval=self.settings.interval, **SYSTEMS[name])

    def with_options(self, name: str, **options: Any) -> System:
        """A system with options of `hero_fx.backend`."""
        return compiled_with(self.model, name, inner=self.settings.inner, num_steps=self.settings.steps, **options)

    def call(self, system: System, **inputs: Any) -> Any:
        """The pipeline's output for one clip or window; the seconds of its steps go to the system."""
        settings, seconds = self.settings, []
        self.pipe.progress_bar = _Steps(system.name, settings.device, seconds)
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        kernel = sdpa_kernel(ATTENTION[settings.attention]) if settings.attention else nullcontext()
        given = {"num_inference_steps": settings.steps, **inputs}
        with kernel:
            output = self.pipe(generator=generator, **given)
        system.seconds.append(seconds)
        return output

    @contextmanager
    def measured(self, system: System, **warm_up: Any) -> Iterator[dict[str, float]]:
        """Compiles the system by a call of one step, then measures what is run within, and frees its state behind it.

        What is yielded has, at the end, `first_s` (the compiling call), `seconds` (all within), `peak_gb` (of the GPU's memory
        within, or of the process so far where there is none) and `state_gb`.
        """
        torch.compiler.reset()  # systems share one model, and Dynamo has a limit of compilations for one function
        self._install(system)
        gpu, found = self.settings.device.startswith("cuda"), {}
        start = time.perf_counter()
        self.call(system, **{**warm_up, "num_inference_steps": 1})
        found["first_s"] = time.perf_counter() - start
        system.seconds.clear()
        if system.backend is not None:
            system.backend.reset()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield found
        found["seconds"] = time.perf_counter() - start
        found["peak_gb"] = (torch.cuda.max_memory_allocated() if gpu else process_peak()) / 1e9
        found["state_gb"] = system.backend.stats().state_bytes / 1e9 if system.backend is not None else 0.0
        if system.backend is not None:
            system.backend.reset()

    def _install(self, system: System) -> None:
        if self.settings.offload:
            self.pipe.remove_all_hooks()
        self.pipe.transformer = system.transformer
        if self.settings.offload:  # behind torch.compile: a hook that is there before breaks the graph
            self.pipe.enable_model_cpu_offload(device=self.settings.device)


def row(system: System, found: dict[str, float], steps: int, normal: torch.fx.GraphModule | None) -> dict[str, Any]:
    """The figures of a system; FLOPs are those of one trajectory, and need the graph of the model."""
    by_kind = system.by_kind(steps)
    result: dict[str, Any] = {
        "full + cached steps": system.counted(steps),
        "seconds, all": found["seconds"],
        "seconds of denoising, a window": system.total(),
        "seconds, full step": by_kind[None],
        "seconds, cached step": by_kind.get(0),
        "seconds, compiling call": found["first_s"],
        "peak memory, GB": found["peak_gb"],
        "feature state, GB": found["state_gb"],
    }
    if normal is not None:
        whole, spent = hero_fx.flops(normal) * steps, system.flops(steps, normal)
        result["TFLOPs of a window, GEMM"] = spent.gemm / 1e12
        result["TFLOPs of a window, with attention"] = spent.total / 1e12
        result["speed-up that FLOPs with attention allow"] = whole.total / spent.total
    return result


def normal_of(systems: Iterable[System]) -> torch.fx.GraphModule | None:
    """The graph of the model as it is, from any system that keeps it."""
    return next((steps.normal for system in systems if (steps := system.graphs()) is not None), None)


def process_peak() -> int:
    """Bytes of memory that the process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Steps:
    """Stands in for a pipeline's progress bar: shows one, and notes the seconds of each step."""

    def __init__(self, name: str, device: str, seconds: list[float]) -> None:
        self.name, self.seconds = name, seconds
        self._wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    @contextmanager
    def __call__(self, total: int) -> Iterator[Any]:
        self._wait()
        last = time.perf_counter()
        with tqdm(total=total, desc=self.name, leave=False) as bar:

            def update() -> None:
                nonlocal last
                self._wait()
                now = time.perf_counter()
                self.seconds.append(now - last)
                last = now
                bar.update()

            yield SimpleNamespace(update=update)
