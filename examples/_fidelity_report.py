"""Figures of the fidelity bench: what is measured of a setting, its tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor

from _fidelity_rivals import CACHE_DIT, SOLVERS
from _fidelity_run import Cost, Truth
from _fidelity_settings import APART, METHODS, PLAN, Setting
from _metrics import depth_errors, intervals, pose_errors, psnr, relative_l2, ssim
from world.latents import DISPARITY_SCALE, DISPARITY_SHIFT, FOLD, MODALITIES, decode

__all__ = ["Row", "figures", "glance", "measure", "plot", "summary", "table", "triple"]

Array = NDArray[Any]

HIGHER = ("psnr", "ssim", "delta_1", "delta_2")
"""Metrics, or ends of their names, that are better where they are higher; all others are errors."""


@dataclass(frozen=True)
class Row:
    """A setting and what was measured of it."""

    setting: Setting
    cost: Cost
    values: dict[str, Array]
    """By metric: one number per scene."""


def images(latents: Tensor) -> dict[str, Array]:
    """What people look at, per modality [scenes, F, height, width, channels]: RGB in [0, 1], square root of disparity in
    1/sqrt(m), rays in units of their spread over the training scenes."""
    world = decode(latents)
    root = latents[:, :, MODALITIES["disparity"]] * DISPARITY_SCALE + DISPARITY_SHIFT
    flat = root.unflatten(2, (FOLD, FOLD)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    return {
        "rgb": world.rgb.movedim(2, -1).numpy(),
        "disparity": flat[..., None].numpy(),
        "raymap": latents[:, :, MODALITIES["raymap"]].movedim(2, -1).numpy(),
    }


def measure(latents: Tensor, full: Tensor | None, converged: Tensor | None, truth: Truth) -> dict[str, Array]:
    """Every metric of latents [scenes, F, channels, height, width], one number per scene.

    `<modality>_l2`, `_psnr`, `_ssim`: against `full`, full compute from the same noise; None for full compute itself.
    `<modality>_converged`: relative L2 against converged sampling of the same noise, of as many scenes as there are.
    The others: against the rendered truth.
    """
    result: dict[str, Array] = {}
    if full is not None:
        result["l2"] = relative_l2(latents.numpy(), full.numpy())
        ours, reference = images(latents), images(full)
        for name, channels in MODALITIES.items():
            a, b = ours[name], reference[name]
            span = 1.0 if name == "rgb" else np.ptp(b, axis=(1, 2, 3, 4))
            result[f"{name}_l2"] = relative_l2(latents[:, :, channels].numpy(), full[:, :, channels].numpy())
            result[f"{name}_psnr"], result[f"{name}_ssim"] = psnr(a, b, span), ssim(a, b, span)
    if converged is not None:
        some = latents[: len(converged)]
        result["converged"] = relative_l2(some.numpy(), converged.numpy())
        for name, channels in MODALITIES.items():
            result[f"{name}_converged"] = relative_l2(some[:, :, channels].numpy(), converged[:, :, channels].numpy())
    world, real = decode(latents), decode(truth.latents)
    result["truth_psnr"] = psnr(world.rgb.numpy(), real.rgb.numpy(), 1.0)
    result |= depth_errors(world.depth.double().numpy(), truth.depth.double().numpy())
    result |= pose_errors(world.poses.double().numpy(), truth.poses.double().numpy())
    return result


def is_better(metric: str, difference: float) -> bool:
    """Whether a metric that changes by `difference` gets better."""
    return (difference > 0) == metric.endswith(HIGHER)


def figures(row: Row, plain: Cost, hero: Row | None = None) -> dict[str, Any]:
    """A row for JSON: costs, means with 95 % intervals, and paired differences to `hero` (HERO at the same N)."""
    cost = row.cost
    result: dict[str, Any] = {
        "name": row.setting.name,
        "options": {
            key: value if isinstance(value, (int, float)) else str(value)
            for key, value in (row.setting.options or {}).items()
        },
        "steps": cost.steps,
        "full_steps": cost.full_steps,
        "gflops_gemm": cost.gemm / 1e9,
        "gflops_total": cost.total / 1e9,
        "speed_gemm": plain.gemm / cost.gemm,
        "speed_total": plain.total / cost.total,
        "state_mb": cost.state / 1e6,
        "metrics": {},
    }
    for metric, values in row.values.items():
        low, high = intervals(values)
        found = {"mean": float(values.mean()), "low": float(low), "high": float(high), "scenes": len(values)}
        if hero is not None and hero is not row and metric in hero.values:
            difference = values - hero.values[metric]
            low, high = intervals(difference)
            found |= {"less_hero": float(difference.mean()), "less_hero_low": float(low), "less_hero_high": float(high)}
        result["metrics"][metric] = found
    return result


COLUMNS: dict[str, tuple[str, str]] = {
    "rgb_l2": ("RGB L2", ".4f"),
    "rgb_psnr": ("RGB PSNR", ".1f"),
    "rgb_ssim": ("RGB SSIM", ".4f"),
    "disparity_l2": ("disparity L2", ".4f"),
    "disparity_psnr": ("disparity PSNR", ".1f"),
    "disparity_ssim": ("disparity SSIM", ".4f"),
    "raymap_l2": ("raymap L2", ".4f"),
    "raymap_psnr": ("raymap PSNR", ".1f"),
    "raymap_ssim": ("raymap SSIM", ".4f"),
    "rgb_converged": ("RGB to converged", ".4f"),
    "disparity_converged": ("disparity to converged", ".4f"),
    "raymap_converged": ("raymap to converged", ".4f"),
    "truth_psnr": ("RGB PSNR to truth", ".2f"),
    "abs_rel": ("Abs Rel", ".4f"),
    "delta_1": ("δ<1.25", ".4f"),
    "delta_2": ("δ<1.25²", ".4f"),
    "ate": ("ATE, m", ".4f"),
    "rpe_trans": ("RPE trans, m", ".4f"),
    "rpe_rot": ("RPE rot, °", ".3f"),
}
"""Heading and format of each metric."""
TO_FULL = tuple(f"{modality}_{metric}" for modality in MODALITIES for metric in ("l2", "psnr", "ssim"))
TO_TRUTH = tuple(metric for metric in COLUMNS if metric not in TO_FULL)


def cell(metric: str, of: dict[str, Any] | None) -> str:
    """Mean and half the width of its interval; ▲ or ▼ where it is surely better or worse than HERO's, scene by scene."""
    if of is None:
        return ""
    form = COLUMNS[metric][1]
    text = f"{of['mean']:{form}} ± {(of['high'] - of['low']) / 2:{form}}"
    return f"{text} {mark(metric, of)}".rstrip()


def mark(metric: str, of: dict[str, Any]) -> str:
    """▲ or ▼ where a metric is surely better or worse than HERO's: the interval of the differences is on one side of 0."""
    low, high = of.get("less_hero_low", 0.0), of.get("less_hero_high", 0.0)
    if low > 0 or high < 0:
        return "▲" if is_better(metric, low + high) else "▼"
    return ""


def table(rows: Sequence[dict[str, Any]], metrics: Sequence[str], first: str, form: str = "github") -> str:
    """A table of `metrics`, with the costs behind them."""
    lines = [
        [
            row["name"],
            row["full_steps"],
            *[cell(metric, row["metrics"].get(metric)) for metric in metrics],
            f"{row['gflops_gemm']:.1f}",
            f"{row['speed_gemm']:.2f}",
            f"{row['speed_total']:.2f}",
        ]
        for row in rows
    ]
    headers = [first, "full steps", *[COLUMNS[m][0] for m in metrics], "GEMM GFLOPs", "speed", "with attention"]
    return tabulate(lines, headers=headers, tablefmt=form, disable_numparse=True)


def triple(metrics: dict[str, Any], kind: str) -> str:
    """Means of `<modality>_<kind>` in thousandths, RGB / disparity / raymap, marked as in `cell`."""
    parts = []
    for modality in MODALITIES:
        of = metrics.get(f"{modality}_{kind}")
        if of is not None:
            parts.append(f"{1000 * of['mean']:.1f}{mark(kind, of)}")
    return " / ".join(parts)


def summary(rows: Sequence[dict[str, Any]], first: str, form: str = "github") -> str:
    """The main figures of a table in one, without intervals."""
    single = ("rgb_psnr", "rgb_ssim", "abs_rel", "delta_1", "ate", "rpe_trans", "rpe_rot")
    lines = []
    for row in rows:
        of = row["metrics"]
        cells = [f"{of[m]['mean']:{COLUMNS[m][1]}}{mark(m, of[m])}" if m in of else "" for m in single]
        costs = [f"{row['gflops_gemm']:.1f}", f"{row['speed_gemm']:.2f}", f"{row['speed_total']:.2f}"]
        lines.append(
            [row["name"], row["full_steps"], triple(of, "l2"), *cells[:2], triple(of, "converged"), *cells[2:], *costs]
        )
    full, converged = "L2 to full, ‰: RGB / disparity / raymap", "L2 to converged, ‰: RGB / disparity / raymap"
    names = [COLUMNS[m][0] for m in single]
    headers = [first, "full steps", full, *names[:2], converged, *names[2:], "GEMM GFLOPs", "speed", "with attention"]
    return tabulate(lines, headers=headers, tablefmt=form, disable_numparse=True)


def glance(rows: Sequence[dict[str, Any]], form: str = "github") -> str:
    """A line per method and a column per N: distance to full compute, and the speed-up by FLOPs, attention's included."""
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        if (interval := row.get("interval")) is not None:
            name = "fewer steps" if row["name"].startswith("plain, ") else row["name"].removesuffix(f", N={interval}")
            found.setdefault(name, {})[interval] = f"{triple(row['metrics'], 'l2')} ({row['speed_total']:.2f})"
    intervals = list(dict.fromkeys(n for cells in found.values() for n in cells))
    lines = [[name, *[cells.get(n, "") for n in intervals]] for name, cells in found.items()]
    return tabulate(lines, headers=["method", *[f"N={n}" for n in intervals]], tablefmt=form, disable_numparse=True)


PANELS = ("rgb_l2", "disparity_l2", "raymap_l2", "rgb_converged", "abs_rel", "ate")


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Errors against speed-up by FLOPs: a line per method over N, one for fewer steps, full compute as a level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.2, 7.2), layout="constrained")
    figure.suptitle(title)
    lines: dict[str, list[dict[str, Any]]] = {
        name: [] for name in (*METHODS, PLAN, APART, CACHE_DIT, *SOLVERS.values(), "growing window", "fewer steps")
    }
    for row in rows:
        name = row["name"].split(", ")[0]
        lines.get(name, lines["fewer steps"] if row["name"].startswith("plain") else []).append(row)
    lines = {name: points for name, points in lines.items() if points}  # each gets a colour
    for axis, metric in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        axis.set_visible(any(metric in row["metrics"] for row in rows))
        for number, (name, points) in enumerate(lines.items()):
            shown = sorted((p for p in points if metric in p["metrics"]), key=lambda p: p["speed_total"])
            if not shown:
                continue
            found = [p["metrics"][metric] for p in shown]
            means = [f["mean"] for f in found]
            bars = [[f["mean"] - f["low"] for f in found], [f["high"] - f["mean"] for f in found]]
            style = "k--" if name == "fewer steps" else f"C{number}-"
            axis.errorbar(
                [p["speed_total"] for p in shown],
                means,
                bars,
                fmt=f"{style}o",
                markersize=3,
                capsize=2,
                lw=1,
                label=name,
            )
        level = next((row["metrics"].get(metric) for row in rows if row["name"] == "full compute"), None)
        if level is not None:
            axis.axhline(level["mean"], color="grey", lw=0.8, ls=":", label="full compute")
        axis.set(xlabel="speed-up by FLOPs, attention's in", ylabel=COLUMNS[metric][0])
        axis.set_yscale("log" if metric.endswith(("l2", "converged")) else "linear")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
