"""Tables 1 to 4 of the paper: their rows, at what settings each was taken, and its figures.

Settings and FLOPs are those of `paper_flops.py`; quality and seconds (one A100 of 80 GB) are copied from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paper_flops import PLANNING, RECONSTRUCTION, rows

VBENCH = ("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
          "imaging_quality")  # fmt: skip
"""In per cent."""
DEPTH = ("abs_rel", "delta_1", "delta_2")
CAMERA = ("ate", "rpe_trans", "rpe_rot")
COLUMNS = {"planning": (*VBENCH, "seconds"), "reconstruction": (*DEPTH, *CAMERA, "seconds")}
FIGURES: dict[str, tuple[float, ...]] = {
    "planning, full compute": (93.70, 95.21, 98.03, 90.09, 49.33, 64.21, 191.41),
    "planning, FORA N=2": (91.94, 94.53, 97.58, 90.09, 47.62, 61.90, 108.43),
    "planning, ToCa N=2": (92.03, 94.37, 97.86, 90.09, 49.68, 60.76, 138.45),
    "planning, TaylorSeer N=2": (89.06, 93.62, 96.23, 89.18, 47.78, 58.55, 108.43),
    "planning, HERO N=2": (93.42, 95.02, 97.90, 90.09, 49.34, 64.21, 113.98),
    "planning, HERO N=3": (92.05, 94.90, 97.53, 90.09, 50.02, 61.92, 101.13),
    "reconstruction, full compute": (0.340, 0.502, 0.738, 0.177, 0.068, 0.780, 55.42),
    "reconstruction, FORA N=2": (0.345, 0.483, 0.733, 0.193, 0.084, 0.891, 30.45),
    "reconstruction, ToCa N=2": (0.349, 0.488, 0.716, 0.217, 0.071, 0.862, 39.63),
    "reconstruction, TaylorSeer N=2": (0.356, 0.466, 0.728, 0.205, 0.087, 1.105, 30.45),
    "reconstruction, HERO N=2": (0.344, 0.502, 0.734, 0.182, 0.069, 0.816, 32.34),
    "reconstruction, HERO N=3": (0.347, 0.490, 0.716, 0.181, 0.071, 0.861, 27.44),
    "table 3, ratio 5/6": (93.21, 94.69, 97.86, 90.09, 49.36, 64.11, 133.56),
    "table 3, ratio 4/6": (93.20, 94.71, 97.86, 90.09, 49.35, 64.12, 128.37),
    "table 3, ratio 3/6": (93.21, 94.73, 97.85, 90.09, 49.35, 64.11, 123.14),
    "table 3, ratio 2/6": (93.21, 94.75, 97.86, 90.09, 49.36, 64.10, 117.95),
    "table 3, ratio 1/6": (93.21, 94.72, 97.86, 90.09, 49.35, 64.12, 112.73),
    "table 4, M=6": (90.01, 93.71, 97.31, 89.19, 48.06, 59.06, 109.89),
    "table 4, M=11": (90.05, 93.65, 93.33, 90.09, 48.13, 61.10, 111.45),
    "table 4, M=16": (93.21, 94.72, 97.86, 90.09, 49.35, 64.12, 112.73),
    "table 4, M=21": (93.42, 95.02, 97.90, 90.09, 49.34, 64.21, 113.98),
    "table 4, M=26": (93.40, 95.02, 97.92, 90.09, 49.22, 64.02, 115.32),
    "table 4, M=31": (93.44, 95.11, 97.97, 90.09, 49.24, 63.83, 117.02),
    "table 4, M=36": (93.44, 95.12, 97.97, 90.09, 49.24, 64.06, 118.87),
}


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    table: int
    task: str
    steps: int
    options: dict[str, Any]
    """Of `hero_fx.backend`."""
    paper: dict[str, float]
    """The paper's figures by metric; empty in rows that the paper does not have."""


def table_rows(number: int) -> list[Row]:
    """The rows of a table; after those of Tables 1 and 2 stands hero_fx's default.

    In the paper, tokens that are not sampled reuse their features, which `unsampled` says here: FLOPs do not depend on it.
    """
    prefix = {1: "planning,", 2: "reconstruction,", 3: "table 3,", 4: "table 4,"}[number]
    task = "reconstruction" if number == 2 else "planning"
    steps = (RECONSTRUCTION if number == 2 else PLANNING)[0]
    found = []
    for row in rows():
        if row.name.startswith(prefix):
            options = {**row.options, "unsampled": "reuse"} if row.options["policy"] == "hero" else row.options
            figures = dict(zip(COLUMNS[task], FIGURES[row.name], strict=True)) | {"tflops": row.paper}
            found.append(Row(row.name, number, task, steps, options, figures))
    if number in (1, 2):
        found.append(Row(f"{task}, hero_fx's default N=2", number, task, steps, {"interval": 2}, {}))
    return found
