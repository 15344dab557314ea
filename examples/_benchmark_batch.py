"""Requests in one call against requests one after the other: `benchmark.py --requests 4`.

All requests are at steps of their own, each one behind the one before: at N=2 half of them are at a full step while the
others are at a cached one. A turn takes every request two steps further, so each makes one full and one cached step, one
request after the other or all in one call. Seconds are per request and step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import hero_fx
from _model import CONDITION, LATENT, Setting, rotary, world_model

__all__ = ["SYSTEMS", "table", "throughput"]

SYSTEMS = ("inductor", "hero", "forecast")
Extrapolated = Callable[[tuple[bool, ...], Tensor], hero_fx.Plan]
"""Makes a forecast plan of a schedule and timesteps."""


class Requests:
    """Requests over one compiled model, each at a step of its own."""

    def __init__(self, name: str, preset: Setting, call: Callable[..., Any], requests: int, steps: int) -> None:
        self.name, self.call, self.steps = name, call, steps
        self.times = torch.linspace(999, 19, steps).round().long().to(preset.device)
        frames, height, width = preset.size
        generator = torch.Generator().manual_seed(2)

        def noise(*shape: int) -> Tensor:
            return torch.randn(requests, *shape, generator=generator).to(preset.device, preset.dtype)

        self.latents = noise(frames, LATENT + CONDITION, height, width)
        self.text = noise(*preset.text)
        self.rotary = rotary(preset)
        self.at = [-i for i in range(requests)]
        self.wait = torch.cuda.synchronize if preset.device == "cuda" else lambda: None

    def warm_up(self) -> None:
        """Takes each request to a step of its own: the first to the last one's number, the last to its first."""
        while self.at[-1] < 0:
            for i, step in enumerate(self.at):
                if step >= 0:
                    self._run([i], self._word([i]))
                self.at[i] += 1

    def turn(self, *, together: bool) -> float:
        """Seconds per request and step, of two steps."""
        self.wait()
        start = time.perf_counter()
        for _ in range(2):
            everyone = list(range(len(self.at)))
            for part in [everyone] if together else [[i] for i in everyone]:
                self._run(part, self._word(part))
            self.at = [step + 1 for step in self.at]
        self.wait()
        return (time.perf_counter() - start) / (2 * len(self.at))

    def _word(self, part: list[int]) -> AbstractContextManager[Any]:
        if self.name.startswith("inductor"):
            return nullcontext()
        return hero_fx.batch(
            [hero_fx.calling(session=f"{self.name}-{i}", step_index=self.at[i], num_steps=self.steps) for i in part],
            buckets=(max(2, (len(self.at) + 1) // 2), len(self.at)),
        )

    def _run(self, part: list[int], word: AbstractContextManager[Any]) -> None:
        times = torch.stack([self.times[self.at[i]] for i in part])
        with word:
            self.call(
                hidden_states=self.latents[part],
                encoder_hidden_states=self.text[part],
                image_rotary_emb=self.rotary,
                timestep=times,
                return_dict=False,
            )


def _ways(
    preset: Setting, names: Sequence[str], plan: Extrapolated, requests: int, rounds: int, inner: str
) -> Iterator[tuple[str, Requests]]:
    model, steps = world_model(preset), requests + 2 * rounds + 3
    for name in names:
        backend: Any = inner
        if name == "hero":
            backend = hero_fx.backend(interval=2, warmup=1, inner=inner)
        if name == "forecast":
            mask = tuple(step % 2 == 0 for step in range(steps))
            backend = hero_fx.backend(plan=plan(mask, torch.linspace(999, 19, steps).round()), inner=inner)
        call = torch.compile(model, backend=backend, fullgraph=True, dynamic=False if name == "inductor" else None)
        for way in ("in turn", "together"):
            yield f"{name}, {way}", Requests(f"{name}, {way}", preset, call, requests, steps)


def throughput(
    preset: Setting, names: Sequence[str], plan: Extrapolated, requests: int, rounds: int, inner: str
) -> dict[str, list[float]]:
    """Seconds per request and step of each way, for each round that counts; `names` of `SYSTEMS`."""
    ways = dict(_ways(preset, names, plan, requests, rounds, inner))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, of in tqdm(ways.items(), leave=False, desc="warm-up"):
        of.warm_up()
        of.turn(together=name.endswith("together"))  # compiles
    for number in tqdm(range(rounds), leave=False, desc="rounds"):
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in names:
            seconds[name].append(ways[name].turn(together=name.endswith("together")))
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """One row for each way: seconds as median (lowest .. highest), and how many times more steps a second."""
    name, times = next(iter(seconds.items()))
    first = median(times)
    rows = [
        [way, f"{median(s):.4g} ({min(s):.4g} .. {max(s):.4g})", f"{1 / median(s):.3g}", f"{first / median(s):.2f}"]
        for way, s in seconds.items()
    ]
    headers = ["", "seconds a request\nand step", "steps\na second", f"over\n{name}"]
    return tabulate(rows, headers=headers, disable_numparse=True)
