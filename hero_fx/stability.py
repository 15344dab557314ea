"""Hierarchical analysis (paper, section 3.2): how the features of each layer move along a trajectory.

`Recorder` is a torch.compile backend like `hero_fx.backend`, but it changes nothing: every step computes all layers, and the
graph returns the features of every layer beside its own outputs. With F_t a layer's features at step t, and the differences
D_t = F_t - F_{t-1} and S_t = D_t - D_{t-1}:

=============  ===========================================================================================
reuse          is off by D one step behind a full step (FORA, HERO's shallow layers with `unsampled="reuse"`)
extrapolation  is off by S one step behind two full steps in a row (TaylorSeer, HERO's deep layers, Eq. 6, and by default
               the tokens of shallow ones that are not sampled)
stability      of a layer: variance over t of S, mean over tokens and channels, scaled to [0, 1] over the layers, 1 = stable
=============  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

from hero_fx.passes.pipeline import Pipeline
from hero_fx.passes.rewrite.observe import Features, ReturnFeatures
from hero_fx.runtime.evidence import Evidence
from hero_fx.runtime.timestep import TimestepReader
from hero_fx.runtime.tracker import Tracker

from .backends import backend
from .compiling import compile_step
from .find_timestep import find_timestep
from .schedule import Uniform
from .step_graphs import copy_graph

__all__ = ["Features", "Recorder", "Stability", "split"]


class Recorder:
    """A torch.compile backend that leaves the model as it is and measures the features of its layers.

    ::

        recorder = hero_fx.analysis.Recorder()
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
        observe = ReturnFeatures(structure=steps.structure, features=self.features)
        Pipeline(label="analysis", passes=(observe,))(graph)
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
            row.append(tuple(none if x is None else _mean_square(x) for x in (value, d, s)))
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
            sum(row[layer][2] for row in self.squares[2:]) / count - _mean_square(total / count)
            for layer, total in enumerate(self.sums)
        ]

    def powers(self) -> list[float]:
        """Per layer, the mean square of the features."""
        return [sum(row[layer][0] for row in self.squares) / len(self.squares) for layer in range(len(self.sums))]


@dataclass(frozen=True, slots=True)
class Stability:
    """How the features of the layers move along trajectories; print it to read it."""

    variance: tuple[float, ...]
    """Per layer, the variance over the steps of the second differences S, mean over tokens and channels."""
    relative: tuple[float, ...]
    """The same in units of the layer's own mean square: it does not grow with the size of the features."""
    feature: tuple[tuple[float, ...], ...]
    """[step][layer]: root mean square of the features F."""
    change: tuple[tuple[float, ...], ...]
    """[step][layer]: of D = F_t - F_{t-1}; not a number at the first step."""
    bend: tuple[tuple[float, ...], ...]
    """[step][layer]: of S = D_t - D_{t-1}; not a number at the first two steps."""
    features: Features
    series: int
    """Trajectories times lanes that this is the mean of."""

    @property
    def score(self) -> tuple[float, ...]:
        """The paper's stability score per layer, in [0, 1]: 1 for the least variance, 0 for the largest."""
        return _normalised(self.variance)

    @property
    def relative_score(self) -> tuple[float, ...]:
        """The same of the relative variance."""
        return _normalised(self.relative)

    @property
    def boundary(self) -> int | None:
        """Where the score would put M: `split(score)`, None if it says that shallow layers are the stable ones."""
        return split(self.score)

    @property
    def relative_boundary(self) -> int | None:
        """The same of the relative score."""
        return split(self.relative_score)

    def __str__(self) -> str:
        rows = []
        for layer, (score, relative) in enumerate(zip(self.score, self.relative_score, strict=True)):
            f, d, s = (_mean(table, layer) for table in (self.feature, self.change, self.bend))
            rows.append([layer, self.variance[layer], score, self.relative[layer], relative, f, d / f, s / f])
        headers = ["layer", "variance of S", "score", "relative", "score", "rms F", "D / F", "S / F"]
        table = tabulate(rows, headers=headers, floatfmt=("", ".3g", ".2f", ".3g", ".2f", ".3f", ".3f", ".3f"))
        lines = [_verdict("score", self.boundary), _verdict("score of the relative variance", self.relative_boundary)]
        what = "updates of the residual stream" if self.features == "update" else "hidden states"
        return f"{what}, {len(self.feature)} steps, {self.series} series\n{table}\n" + "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws how features move (as the paper's Figure 5a) and the scores (5b); needs matplotlib.

        Args:
            path: file to save to; its suffix says the format.

        Returns:
            The matplotlib figure.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        depth = len(self.variance)
        for layer in sorted({0, depth // 3, 2 * depth // 3, depth - 1}):
            size = _mean(self.feature, layer)
            left.plot(range(len(self.bend)), [row[layer] / size for row in self.bend], label=f"layer {layer}")
        left.set(xlabel="step", ylabel="rms of second difference / rms of features", yscale="log")
        left.legend(fontsize=8)
        right.bar([layer - 0.2 for layer in range(depth)], self.score, 0.4, label="variance (the paper's)")
        right.bar([layer + 0.2 for layer in range(depth)], self.relative_score, 0.4, label="relative variance")
        right.set(xlabel="layer", ylabel="stability score", ylim=(0, 1.25))
        styles = ((self.boundary, "C0", "-"), (self.relative_boundary, "C1", "--"))
        for boundary, colour, style in styles:
            if boundary is not None:
                right.axvline(boundary - 0.5, color=colour, linestyle=style, label=f"M = {boundary}")
        right.legend(fontsize=8, ncols=2, loc="upper center")
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def split(scores: Sequence[float]) -> int | None:
    """M, the layers in front of the boundary that parts scores best into a low prefix and a high rest, by least squares.

    None if the prefix of the best parting is the higher one: then nothing speaks for treating shallow layers with more care.
    """

    def spread(part: Sequence[float]) -> float:
        mean = sum(part) / len(part)
        return sum((value - mean) ** 2 for value in part)

    cuts = range(1, len(scores))
    if not cuts:
        return None
    best = min(cuts, key=lambda m: spread(scores[:m]) + spread(scores[m:]))
    prefix, rest = scores[:best], scores[best:]
    return best if sum(prefix) / len(prefix) < sum(rest) / len(rest) else None


def _mean_square(x: Tensor) -> float:
    return float(x.float().square().mean(dtype=torch.float64))


def _mean(table: tuple[tuple[float, ...], ...], layer: int) -> float:
    """Root of the mean square over the steps that have a value."""
    values = [row[layer] for row in table if row[layer] == row[layer]]
    return float((sum(v * v for v in values) / len(values)) ** 0.5)


def _normalised(variances: Sequence[float]) -> tuple[float, ...]:
    low, high = min(variances), max(variances)
    return tuple(1.0 - (v - low) / (high - low) if high > low else 1.0 for v in variances)


def _verdict(name: str, boundary: int | None) -> str:
    if boundary is None:
        return f"by the {name}, shallow layers are no less stable than deep ones: it gives no M; choose it by fidelity"
    return f"by the {name}: M = {boundary} (refresh_layers={boundary})"
