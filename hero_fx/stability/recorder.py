"""Measuring the features of a model's layers while it denoises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from hero_fx import stages
from hero_fx.backends import backend
from hero_fx.compiling import compile_step
from hero_fx.find_timestep import find_timestep
from hero_fx.passes.pipeline import Pipeline
from hero_fx.passes.rewrite.observe import Features
from hero_fx.runtime.evidence import Evidence
from hero_fx.runtime.timestep import TimestepReader
from hero_fx.runtime.tracker import Tracker
from hero_fx.schedule import Uniform
from hero_fx.step_graphs import copy_graph

from .result import Stability, mean_square

__all__ = ["Recorder"]


class Recorder:
    """A torch.compile backend that leaves the model as it is and measures the features of its layers.

    ::

        recorder = hero_fx.stability.Recorder()
        model = torch.compile(model, backend=recorder, fullgraph=True)
        ...  # one or more trajectories, as usual, one after another
        stability = recorder.stability()
        print(stability)
        stability.plot("stability.png")

    It holds three tensors [B, image tokens, width] per layer and lane while a trajectory runs, whatever its length.
    """

    __name__ = "hero_fx_recorder"

    def __init__(
        self,
        *,
        features: Features = "update",
        keep: bool = False,
        timestep: str | int | None = None,
        inner: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Options.

        Args:
            features: of a layer: `"update"`, what it adds to the image tokens' residual stream (attention and FFN behind
                their gates), or `"hidden"`, the stream behind it.
            keep: keep the features of every call on the CPU, in `kept`.
            timestep, inner, mode, options: as in `hero_fx.backend`.

        Raises:
            ValueError: an option is not one of those above.
        """
        if features not in ("update", "hidden"):
            raise ValueError(f"features={features!r} is not one of 'update', 'hidden'")
        self.features = features
        self.keep = keep
        self.kept: list[tuple[Tensor, ...]] = []
        """With `keep`: per call, the features [B, image tokens, width] of every layer."""
        # Any policy would do: the model's own graph and its structure are all that is taken from the trace.
        self._backend = backend("fora", timestep=timestep, inner=inner, mode=mode, options=options)
        self._series: list[_Series] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles one Dynamo graph."""
        steps = self._backend.trace(gm, inputs)
        graph = copy_graph(steps.normal)
        Pipeline(label="stability", passes=stages.observing(steps.structure, self.features))(graph)
        position = find_timestep(steps.normal, self._backend.config.timestep)
        run = compile_step(gm, graph, self._backend.config).run
        count = len(steps.normal.graph.output_node().args[0])  # type: ignore[arg-type]
        tracker, reader = Tracker(Uniform(interval=1)), TimestepReader()
        lanes: dict[int | str, _Series] = {}

        def call(*values: Any) -> Any:
            step = tracker.advance(Evidence(timestep=reader.read(values[position])))
            if step.new_trajectory:
                lanes.clear()
            outputs = run(*values)
            if step.lane not in lanes:
                self._series.append(lanes.setdefault(step.lane, _Series()))
            features = [value.detach() for value in outputs[count:]]
            lanes[step.lane].add(features)
            if self.keep:
                self.kept.append(tuple(value.cpu() for value in features))
            return outputs[:count]

        return call

    def stability(self) -> Stability:
        """What the trajectories so far show, mean over trajectories and lanes.

        Raises:
            ValueError: no trajectory has three steps yet, or models of different depth were recorded.
        """
        series = [s for s in self._series if len(s.squares) > 2]
        if not series:
            raise ValueError(
                "no trajectory of at least three steps was recorded: denoise with the compiled model first"
            )
        if len({len(s.sums) for s in series}) > 1:
            raise ValueError("models of different depth were recorded: give each its own Recorder")
        steps = min(len(s.squares) for s in series)
        per_step = torch.tensor([s.squares[:steps] for s in series], dtype=torch.float64).mean(dim=0).sqrt()
        feature, change, bend = (tuple(map(tuple, per_step[..., i].tolist())) for i in range(3))
        variances = torch.tensor([s.variances() for s in series], dtype=torch.float64).mean(dim=0)
        power = torch.tensor([s.powers() for s in series], dtype=torch.float64).mean(dim=0)
        return Stability(
            variance=tuple(variances.tolist()),
            relative=tuple((variances / power).tolist()),
            feature=feature,
            change=change,
            bend=bend,
            features=self.features,
            series=len(series),
        )


@dataclass(slots=True)
class _Series:
    """Running sums over the steps of one lane of a trajectory."""

    last: list[Tensor] = field(default_factory=list)
    difference: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    """Per layer, the sum of all S."""
    squares: list[list[tuple[float, float, float]]] = field(default_factory=list)
    """[step][layer]: mean squares of F, D and S; not a number where there is none yet."""

    def add(self, features: list[Tensor]) -> None:
        """The next step's features, one tensor per layer."""
        none = float("nan")
        differences, row = [], []
        for layer, value in enumerate(features):
            d = value - self.last[layer] if self.last else None
            s = d - self.difference[layer] if d is not None and self.difference else None
            row.append(tuple(none if x is None else mean_square(x) for x in (value, d, s)))
            if d is not None:
                differences.append(d)
            if s is not None and len(self.sums) == layer:
                self.sums.append(s.clone())
            elif s is not None:
                self.sums[layer] += s
        self.last, self.difference = features, differences
        self.squares.append(row)  # type: ignore[arg-type]

    def variances(self) -> list[float]:
        """Per layer, the variance over steps of every element of S, mean over the elements."""
        count = len(self.squares) - 2
        return [
            sum(row[layer][2] for row in self.squares[2:]) / count - mean_square(total / count)
            for layer, total in enumerate(self.sums)
        ]

    def powers(self) -> list[float]:
        """Per layer, the mean square of the features."""
        return [sum(row[layer][0] for row in self.squares) / len(self.squares) for layer in range(len(self.sums))]
