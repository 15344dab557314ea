"""Ways of running one transformer that are compared: plain `torch.compile`, and hero_fx's policies and plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

import hero_fx

__all__ = ["System", "compiled_with", "plain_system"]


@dataclass
class System:
    """A compiled transformer, and what its runs took and gave."""

    name: str
    transformer: Any
    backend: hero_fx.Backend | None = None
    """None for plain torch.compile."""
    seconds: list[list[float]] = field(default_factory=list)
    """Of each step of each run."""
    output: Any = None

    def total(self) -> float:
        """Seconds per trajectory, the median over runs."""
        return median(map(sum, self.seconds))

    def kinds(self, num_steps: int) -> Sequence[int | str | None]:
        """By step: which kind of cached step it is; None for a full one, `"part"` for one that is full for half the batch."""
        if self.backend is None:
            return (None,) * num_steps
        policy = self.backend.config.make_policy()
        return (None,) * num_steps if policy is None else hero_fx.step_kinds(self.backend.config, policy, num_steps)

    def counted(self, num_steps: int) -> str:
        """How many steps are full and cached, as text."""
        kinds = self.kinds(num_steps)
        full, part = kinds.count(None), kinds.count("part")
        return f"{full}{f' + {part} for half the batch' if part else ''} + {num_steps - full - part}"

    def by_kind(self, num_steps: int) -> dict[int | str | None, float]:
        """Median seconds of each kind of step, over all runs."""
        times: dict[int | str | None, list[float]] = {}
        for of_run in self.seconds:
            for seconds, kind in zip(of_run, self.kinds(num_steps), strict=True):
                times.setdefault(kind, []).append(seconds)
        return {kind: median(of_kind) for kind, of_kind in times.items()}

    def graphs(self) -> hero_fx.StepGraphs | None:
        """The step graphs of the first shape; None for plain torch.compile and `policy="full"`, which have none."""
        return None if self.backend is None or self.backend.config.policy == "full" else self.backend.graphs[0]

    def flops(self, num_steps: int, normal: torch.fx.GraphModule) -> hero_fx.Flops:
        """Of a trajectory of the model whose normalised graph is given."""
        steps = self.graphs()
        if self.backend is None or steps is None:
            return hero_fx.flops(normal) * num_steps
        return hero_fx.trajectory_flops(steps, self.backend.config, num_steps)


def plain_system(model: Any, inner: str) -> System:
    """The model compiled without hero_fx."""
    return System("torch.compile", torch.compile(model, backend=inner, fullgraph=True))


def compiled_with(model: Any, name: str, **options: Any) -> System:
    """The model compiled with options of `hero_fx.backend`."""
    backend = hero_fx.backend(**options)
    return System(name, torch.compile(model, backend=backend, fullgraph=True), backend)
