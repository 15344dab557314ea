"""What Aether takes of an 80 GB card at full size with every policy: weights, feature state, activations; from fake tensors.

    python examples/paper_memory.py [--tasks planning reconstruction] [--json]

The transformer (42 layers, 14,850 + 226 tokens, bf16) is built on the meta device and traced; nothing takes memory or time of
a GPU. *Weights* are the transformer's. *State* is what a policy keeps between steps, for one trajectory. *Activations* are the
most that the values of a step graph take at once: each op's result is a tensor that is freed behind its last use. Inductor
joins ops and so keeps less; the workspaces of kernels and the allocator's gaps come on top. *In all* is their sum.

Text encoder and autoencoder are listed apart: the prompt is always empty, so that the encoder is needed once and can be
freed, and the autoencoder's own activations are not counted here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from tabulate import tabulate
from torch import Tensor, fx
from tqdm import tqdm

import hero_fx
from benchmark import STEPS, extrapolated
from hero_fx.passes.analysis.memory import Memory
from paper_flops import PLANNING, RECONSTRUCTION, aether, capture

CARD = 80e9
"""Bytes, as the card's name has them; a driver and a CUDA context take about half a GB of it."""
TASKS = {"planning": PLANNING, "reconstruction": RECONSTRUCTION}
SYSTEMS: dict[str, dict[str, Any]] = {
    "hero (default)": {},
    'hero, `form="literal"`': {"form": "literal"},
    'hero, `cache_point="pre_gate"`': {"cache_point": "pre_gate"},
    'hero, `unsampled="reuse"`, `keys="sampled"` (the paper)': {"unsampled": "reuse", "keys": "sampled"},
    "the same, literal": {"unsampled": "reuse", "keys": "sampled", "form": "literal"},
    'hero, `keys="sampled+text"`': {"keys": "sampled+text"},
    "hero, `state_dtype=torch.int8`": {"state_dtype": torch.int8},
    "lean": {"policy": "lean"},
    "FORA": {"policy": "fora"},
    "TaylorSeer, order 1": {"policy": "taylorseer"},
    "TaylorSeer, order 2": {"policy": "taylorseer", "order": 2},
    "ToCa": {"policy": "toca"},
    "DuCa": {"policy": "duca"},
    "a calibrated plan": {},
}
"""Options of `hero_fx.backend`, by what the table says."""


def peak_bytes(gm: fx.GraphModule) -> int:
    """The most bytes that values which a graph makes take at once, run op by op; its inputs are not counted."""
    memory, nodes = Memory(gm.graph), list(gm.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for node in nodes:
        group = memory.shown(node)
        if node is not group[0] or any(other.op in ("placeholder", "get_attr", "output") for other in group):
            continue
        last = max(position[user] for other in group for user in (other, *other.users))
        size = sum(x.untyped_storage().nbytes() for x in _tensors(node.meta.get("val")))
        change[position[node]] += size
        change[last + 1] -= size
    peak = now = 0
    for step in change:
        now += step
        peak = max(peak, now)
    return peak


def _tensors(value: Any) -> Iterable[Tensor]:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return (part for part in parts if isinstance(part, Tensor))


def nbytes_of(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def other_parts() -> dict[str, int]:
    """Bytes in bf16 of what is not the transformer: the text encoder (T5 1.1 XXL) and the autoencoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        encoder = T5EncoderModel(config)
        autoencoder = AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512),
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        )
    return {"text encoder": nbytes_of(encoder.bfloat16()), "autoencoder": nbytes_of(autoencoder.bfloat16())}


def measure(name: str, traced: hero_fx.StepGraphs) -> dict[str, float]:
    """Bytes by what they are for, with one way of running the model."""
    if name == "a calibrated plan":
        mask = tuple(step % 3 == 0 for step in range(STEPS))
        backend = hero_fx.backend(plan=extrapolated(mask, torch.linspace(999, 19, STEPS).round()))
    else:
        backend = hero_fx.backend(**SYSTEMS[name])
    steps = backend.rewrite(traced)
    return {
        "state": steps.state_bytes,
        "full step": peak_bytes(steps.full),
        "cached step": max(map(peak_bytes, steps.cached)),
    }


def report(tasks: Iterable[str]) -> dict[str, Any]:
    """Bytes of the weights, and by task and system those of `measure`, or of the plain model."""
    weights = nbytes_of(aether(torch.bfloat16))
    found: dict[str, Any] = {"weights": weights, **other_parts(), "tasks": {}}
    tasks = list(tasks)
    with tqdm(total=len(tasks) * (2 + len(SYSTEMS)), leave=False) as bar:
        for task in tasks:
            bar.set_description(f"{task}: tracing")
            traced = capture(TASKS[task][1], torch.bfloat16)
            bar.update()
            found["tasks"][task] = {
                "torch.compile": {"state": 0, "full step": peak_bytes(traced.normal), "cached step": 0}
            }
            bar.update()
            for name in SYSTEMS:
                bar.set_description(f"{task}: {name}")
                found["tasks"][task][name] = measure(name, traced)
                bar.update()
    return found


def table(systems: dict[str, dict[str, int]], weights: int) -> str:
    """One task's table, in GB."""
    rows = []
    for name, of in systems.items():
        peak = max(of["full step"], of["cached step"])
        total = weights + of["state"] + peak
        sizes = (weights, of["state"], of["full step"], of["cached step"], total)
        fits = "fits" if total < CARD else "does not fit"
        rows.append([name, *(f"{size / 1e9:.2f}" for size in sizes), fits])
    headers = ["GB", "weights", "state", "full step", "cached step", "in all", f"of {CARD / 1e9:.0f}"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    """Prints the tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--json", action="store_true", help="bytes, by task and system")
    arguments = parser.parse_args(argv)
    found = report(arguments.tasks)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for task, systems in found["tasks"].items():
        print(f"\n{task}, batch {TASKS[task][1]}, bf16:\n\n{table(systems, found['weights'])}")
    parts = ", ".join(f"{name} {found[name] / 1e9:.2f} GB" for name in ("text encoder", "autoencoder"))
    print(f"\nweights beside these: {parts}")


if __name__ == "__main__":
    main()
