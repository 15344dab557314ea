"""What recorded features say: how much the layers move, and where a boundary between shallow and deep would lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from hero_fx.passes.rewrite.observe import Features

__all__ = ["Stability", "mean_square", "split"]


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


def mean_square(x: Tensor) -> float:
    """In double precision."""
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
