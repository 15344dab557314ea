"""The FLOPs columns of the paper's tables, counted from hero_fx's rewritten graphs of the full-size Aether transformer.

    python examples/paper_flops.py [--json]

Aether is a CogVideoX-5B transformer of 42 layers on 14,850 image and 226 text tokens. It is built on the meta device and
its graphs hold fake tensors, so neither weights nor activations take memory. The paper counts matrix products and
convolutions alone ("GEMM"); "with attention" adds Q K^T and P V, which is what hardware feels. The FLOPs of a row are those
of the step graphs it runs, each times the number of steps that run it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from tabulate import tabulate
from tqdm import tqdm

import hero_fx

PLANNING, RECONSTRUCTION = (50, 2), (30, 1)
"""(denoising steps, batch): planning uses classifier-free guidance, batched."""


@dataclass(frozen=True)
class Row:
    """One row of a table of the paper."""

    name: str
    task: tuple[int, int]
    paper: float
    """TFLOPs."""
    options: dict[str, Any]
    target: bool = True
    """False where the paper does not say at which settings its figure holds."""


def rows() -> list[Row]:
    """All rows of the paper with FLOPs, and the two of ToCa beside ours."""
    toca = {"schedule": "toca"}
    hero = {"policy": "hero", "keys": "sampled", "refresh_layers": 21, **toca}
    table = [
        Row("planning, full compute", PLANNING, 14352.50, {"policy": "full"}),
        Row("planning, FORA N=2", PLANNING, 7753.18, {"policy": "fora", "interval": 2}),
        Row("planning, TaylorSeer N=2", PLANNING, 7753.18, {"policy": "taylorseer", "interval": 2}),
        Row("planning, ToCa N=2", PLANNING, 10053.38, {"policy": "toca", "interval": 2, **toca}, target=False),
        Row("planning, HERO N=2", PLANNING, 8295.21, {**hero, "interval": 2}),
        Row("planning, HERO N=3", PLANNING, 7241.78, {**hero, "interval": 3}),
        Row("reconstruction, full compute", RECONSTRUCTION, 4305.60, {"policy": "full"}),
        Row("reconstruction, FORA N=2", RECONSTRUCTION, 2440.64, {"policy": "fora", "interval": 2}),
        Row("reconstruction, TaylorSeer N=2", RECONSTRUCTION, 2440.64, {"policy": "taylorseer", "interval": 2}),
        Row(
            "reconstruction, ToCa N=2", RECONSTRUCTION, 3373.24, {"policy": "toca", "interval": 2, **toca}, target=False
        ),
        Row("reconstruction, HERO N=2", RECONSTRUCTION, 2593.90, {**hero, "interval": 2}),
        Row("reconstruction, HERO N=3", RECONSTRUCTION, 2198.88, {**hero, "interval": 3}),
    ]
    for sixths, paper in zip((5, 4, 3, 2, 1), (9816.90, 9404.28, 8991.43, 8578.81, 8166.19), strict=True):
        options = {**hero, "refresh_layers": 16, "refresh_ratio": sixths / 6}
        table.append(Row(f"table 3, ratio {sixths}/6", PLANNING, paper, options))
    depths = (6, 11, 16, 21, 26, 31, 36)
    figures = (7908.13, 8037.16, 8166.19, 8295.22, 8424.25, 8553.51, 8682.54)
    for layers, paper in zip(depths, figures, strict=True):
        table.append(Row(f"table 4, M={layers}", PLANNING, paper, {**hero, "refresh_layers": layers}))
    return table


def aether(dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """The full-size transformer on the meta device."""
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(
            num_attention_heads=48,
            attention_head_dim=64,
            num_layers=42,
            in_channels=96,
            out_channels=56,
            time_embed_dim=512,
            text_embed_dim=4096,
            patch_size=2,
            sample_frames=41,
            sample_height=60,
            sample_width=90,
            max_text_seq_length=226,
            use_rotary_positional_embeddings=True,
        )
    return torch.nn.Module.to(model, dtype).eval().requires_grad_(False)


def capture(batch: int, dtype: torch.dtype = torch.float32) -> hero_fx.StepGraphs:
    """The full-size transformer, traced."""
    model = aether(dtype)
    with torch.device("meta"):
        inputs = {
            "hidden_states": torch.empty(batch, 11, 96, 60, 90, dtype=dtype),
            "encoder_hidden_states": torch.empty(batch, 226, 4096, dtype=dtype),
            "timestep": torch.empty(batch, dtype=torch.int64),
            "image_rotary_emb": (torch.empty(14850, 64), torch.empty(14850, 64)),
        }
    return hero_fx.trace(model, **inputs, return_dict=False, backend=hero_fx.backend("fora"))


def measure(row: Row, traced: hero_fx.StepGraphs) -> hero_fx.Flops:
    """FLOPs of a trajectory with the row's options."""
    num_steps = row.task[0]
    if row.options["policy"] == "full":
        return hero_fx.flops(traced.normal) * num_steps
    # The algebra of the collapsed form moves and merges caches; its matrix products are those of the literal form.
    backend = hero_fx.backend(num_steps=num_steps, form="literal", **row.options)
    return hero_fx.trajectory_flops(backend.rewrite(traced), backend.config, num_steps)


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"row": {"ours": TFLOPs, "paper": TFLOPs, ...}}, without the rows of ToCa',
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    table = rows()
    with tqdm(total=2 + len(table), desc="capturing Aether, 42 layers", leave=False) as bar:
        traced = {}
        for task in (PLANNING, RECONSTRUCTION):
            traced[task] = capture(task[1])
            bar.update()
        results = []
        for row in table:
            bar.set_description(row.name)
            results.append(measure(row, traced[row.task]))
            bar.update()
    base = {row.task: flops for row, flops in zip(table, results, strict=True) if row.options["policy"] == "full"}
    report = {}
    for row, flops in zip(table, results, strict=True):
        report[row.name] = {
            "ours": flops.gemm / 1e12,
            "paper": row.paper,
            "ours_with_attention": flops.total / 1e12,
            "speedup_gemm": base[row.task].gemm / flops.gemm,
            "speedup_with_attention": base[row.task].total / flops.total,
        }
    if arguments.json:
        print(json.dumps({row.name: report[row.name] for row in table if row.target}, indent=1))
        return
    lines = []
    for row in table:
        figures = report[row.name]
        error = f"{100 * (figures['ours'] / row.paper - 1):+.3f} %" if row.target else "no settings given"
        lines.append([row.name, *list(figures.values())[:2], error, *list(figures.values())[2:]])
    headers = ["TFLOPs", "ours (GEMM)", "paper", "difference", "with attention", "speed-up", "with attention"]
    print(tabulate(lines, headers=headers, floatfmt=("", ",.2f", ",.2f", "", ",.2f", ".3f", ".3f")))
    print(f"\n{time.perf_counter() - start:.0f} s; speed-up: full compute / row, by these FLOPs")


if __name__ == "__main__":
    main()
