"""Finds branches in models of every make, and writes down what was found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hero_fx.passes.analysis.branches import find_branches
from hero_fx.passes.analysis.structure import Structure

from .layers import Layer, Model, Part, attend, norm
from .tracing import normal_form


def describe(structure: Structure) -> str:
    """Streams with their tokens, then one line per branch."""
    streams = [f"{s.name}: {' '.join(map(str, s.tokens.segments))} x {s.width}" for s in structure.streams]
    lines = []
    for branch in structure.branches:
        updates = [f"{structure.streams[u.stream].name}: {u.add} = {u.residual} + {u.update}" for u in branch.updates]
        gates = [f" of {u.feature}" * (u.feature != u.update) for u in branch.updates]
        reads = [f"{node} ({structure.streams[stream].name})" for node, stream in branch.reads]
        parts = "; ".join(u + g for u, g in zip(updates, gates, strict=True))
        lines.append(f"{branch.label} [{branch.module}] {parts}; reads {', '.join(reads)}")
    return "\n".join([*streams, *lines, f"image: {structure.image} {structure.image_tokens} {structure.grid}"])


def found(layer: Layer, *shapes: tuple[int, ...], layers: int = 2) -> Structure:
    torch.manual_seed(0)
    return find_branches(normal_form(Model(layer, layers).eval(), *map(torch.ones, shapes)))


def single(part: Part, x: Tensor) -> Any:
    """As in Flux: attention and FFN side by side, one projection for both."""
    n = norm(x)
    return x + part.both(torch.cat([attend(*part.qkv(n).chunk(3, dim=-1)), F.gelu(part.up(n))], dim=-1))


def joint(part: Part, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """As in SD3: one attention over both streams, an FFN for each."""
    together = attend(*part.qkv(torch.cat([norm(text), norm(x)], dim=1)).chunk(3, dim=-1))
    for_text, for_image = part.out(together).split([text.shape[1], x.shape[1]], dim=1)
    x, text = x + for_image, text + for_text
    return x + part.ffn(norm(x)), text + part.ffn(norm(text))
