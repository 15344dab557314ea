"""Tables and the plot of the bench on moving shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from _fidelity_report import mark
from _fidelity_settings import PLAN
from _metrics import intervals

__all__ = ["SOLVERS", "paired", "plot", "table"]

SOLVERS = {"heun": "Heun", "unipc": "UniPC", "dpm++": "DPM-Solver++ 2M"}
"""Names of `Setting.solver`, and what people call them."""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Distances in thousandths, with half of their 95 % intervals, and costs."""
    lines = []
    for row in rows:
        cells = [row["name"], row["full_steps"]]
        for metric in ("l2", "video_l2", "converged", "video_converged"):
            of = row["metrics"].get(metric)
            cells.append(
                "" if of is None else f"{1e3 * of['mean']:.1f} ± {500 * (of['high'] - of['low']):.1f}{mark(metric, of)}"
            )
        lines.append([*cells, f"{row['speed_total']:.2f}", f"{row['state_mb']:.2f}"])
    heads = ["method", "full steps or evaluations", "latents to full, ‰", "clips to full, ‰", "latents to converged, ‰"]
    heads += ["clips to converged, ‰", "speed by FLOPs", "state, MB per clip"]
    return tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)


def paired(rows: Sequence[dict[str, Any]]) -> str:
    """How much further off a plan is than others, clip by clip: at the same N, or with the next more FLOPs."""
    lines = []
    for plan in (row for row in rows if row["name"].startswith(PLAN)):
        same = [row for row in rows if row["name"].endswith(plan["name"].removeprefix(PLAN)) and row is not plan]
        for name in ("plain", *SOLVERS.values()):
            more = [r for r in rows if r["name"].startswith(name) and r["speed_total"] < plan["speed_total"] + 0.01]
            same += sorted(more, key=lambda r: r["speed_total"])[-1:]
        for row in same:
            cells = [plan["name"], row["name"], f"{plan['speed_total']:.2f} / {row['speed_total']:.2f}"]
            for metric in ("l2", "converged"):
                less = 1e3 * (np.array(plan["values"][metric]) - np.array(row["values"][metric]))
                low, high = intervals(less)
                cells.append(f"{less.mean():+.1f} ({low:+.1f} to {high:+.1f})")
            lines.append(cells)
    heads = ["plan", "less", "speeds", "latents to full, ‰", "latents to converged, ‰"]
    return tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Distances of the latents against speed-up by FLOPs, a line per method over N."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    names = dict.fromkeys(row["name"].split(", ")[0] for row in rows[1:])
    for axis, (metric, of) in zip(
        figure.subplots(1, 2), (("l2", "full compute"), ("converged", "converged sampling")), strict=True
    ):
        for name in names:
            points = sorted((r for r in rows[1:] if r["name"].split(", ")[0] == name), key=lambda r: r["speed_total"])
            style = "o--" if name in ("plain", *SOLVERS.values()) else "o-"
            axis.plot(
                [p["speed_total"] for p in points],
                [p["metrics"][metric]["mean"] for p in points],
                style,
                ms=3,
                label=name,
            )
        if metric in rows[0]["metrics"]:
            axis.axhline(rows[0]["metrics"][metric]["mean"], color="grey", lw=0.8, ls=":", label="full compute")
        axis.set(xlabel="speed-up by FLOPs, attention's in", ylabel=f"relative L2 to {of}", yscale="log")
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
