"""The quickstart's table."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate

import hero_fx
from _quickstart_ways import Outcome
from world.evaluate import errors
from world.latents import MODALITIES
from world.render import Clips

__all__ = ["report"]


def column(of: Outcome, plain: Outcome, whole: hero_fx.Flops, clips: Clips) -> dict[str, str]:
    """The table's column for one way of running the model; `whole`: FLOPs of the model itself."""
    spent = of.spent or whole
    found = {
        "full + cached steps": of.counted,
        "seconds per full step (median)": f"{of.by_kind[None]:.3f}",
        "seconds per cached step (median)": f"{of.by_kind[0]:.3f}" if 0 in of.by_kind else "",
        "seconds per trajectory (median)": f"{of.seconds:.1f}",
        "speed-up of the trajectory": f"{plain.seconds / of.seconds:.2f}",
        "speed-up by the medians of steps": f"{plain.of_medians / of.of_medians:.2f}",
        "speed-up that the FLOPs with attention allow": f"{whole.total / spent.total:.2f}",
        "GEMM TFLOPs": f"{spent.gemm / 1e12:.3f}",
        "feature state, MB": f"{of.state_bytes / 1e6:.1f}",
    }
    for name, channels in MODALITIES.items():
        true, ours = (way.output.latents[:, :, channels] for way in (plain, of))
        found[f"{name}: relative L2 to full compute"] = f"{float((ours - true).norm() / true.norm()):.4f}"
    difference = (of.output.rgb - plain.output.rgb).square().mean()
    found["rgb: PSNR to full compute, dB"] = "" if of is plain else f"{float(-10 * difference.log10()):.1f}"
    return found | {f"to the truth: {name}": f"{error:.3f}" for name, error in errors(of.output, clips).items()}


def report(outcomes: Mapping[str, Outcome], clips: Clips) -> str:
    """The table; the first of the outcomes is of plain `torch.compile`."""
    plain = next(iter(outcomes.values()))
    whole = next(of.whole for of in outcomes.values() if of.whole is not None)
    columns = [column(of, plain, whole, clips) for of in outcomes.values()]
    rows = [[name, *(of[name] for of in columns)] for name in columns[0]]
    return tabulate(rows, headers=["", *outcomes], disable_numparse=True, stralign="right")
