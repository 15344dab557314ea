"""The formulas of the reference: what the model computes in a block, and what the methods compute of features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


# ------------------------------------------------------------------------------------ what the model computes
def modulated(norm: Any, tokens: Tensor, n_text: int, emb: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised and modulated tokens, and the gate of every token, both ``[B, S+N, D]``."""
    image, text, image_gate, text_gate = norm(tokens[:, n_text:], tokens[:, :n_text], emb)
    gate = torch.cat([text_gate.expand_as(text), image_gate.expand_as(image)], dim=1)
    return torch.cat([text, image], dim=1), gate


def joint_rotary(rotary: tuple[Tensor, Tensor], n_text: int) -> tuple[Tensor, Tensor]:
    """Tables (cos, sin) ``[S+N, head_dim]`` from those of image tokens; text is turned by the angle 0."""
    cos, sin = rotary
    one, zero = torch.ones_like(cos[:1]).expand(n_text, -1), torch.zeros_like(sin[:1]).expand(n_text, -1)
    return torch.cat([one, cos]), torch.cat([zero, sin])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, heads, n, head_dim]``, channels (2j, 2j+1) a pair; tables broadcast."""
    real, imag = x.unflatten(3, (-1, 2)).unbind(4)
    turned = torch.stack([-imag, real], dim=4).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def qkv(attn: Any, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, n, head_dim]`` as attention is given them."""
    q, k, v = [p(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v)]
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    return q, k, v


def unpatchify(image: Tensor, shape: Sequence[int], p: int) -> Tensor:
    """Tokens ``[B, N, channels * p * p]`` to the video ``[B, frames, channels, height, width]``."""
    batch, frames, _, height, width = shape
    image = image.reshape(batch, frames, height // p, width // p, -1, p, p)
    return image.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


# ----------------------------------------------------------------------------------- what the methods compute
def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, K]`` of ``x [B, n, D]``."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


def put(x: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """``x [B, n, D]`` with rows ``[B, K]`` replaced by ``new [B, K, D]``."""
    return x.scatter(1, rows[:, :, None].expand_as(new), new)


def differences(c: Tensor, before: Sequence[Tensor], order: int, d: int, fulls: int) -> list[Tensor]:
    """Y of a full step at which C = c; ``before`` is Y until then. Zero where full steps were too few."""
    y = [c]
    for i in range(1, order + 1):
        y.append((y[i - 1] - before[i - 1]) / d if fulls >= i else torch.zeros_like(c))
    return y


def drift(y: Sequence[Tensor], x: int, weight: Callable[[int], Tensor | float] | None = None) -> Tensor:
    """What the estimate x steps after the full step adds to ``Y[0]``; ``weight``: i -> what a plan has for x^i / i!."""
    total = torch.zeros_like(y[0])
    for i in range(1, len(y)):
        total = total + y[i] * (x**i / math.factorial(i) if weight is None else weight(i))
    return total


def attention_received(q: Tensor, k: Tensor, n_text: int) -> Tensor:
    """ToCa's base score ``[B, N]``: what image keys receive from all queries, over heads; unit L2 norm."""
    probability = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=3)
    received = probability.sum(dim=2).mean(dim=1)[:, n_text:]
    return functional.normalize(received, p=2.0, dim=1)


def value_smallness(v: Tensor, n_text: int) -> Tensor:
    """DuCa's base score ``[B, N]``: 1 - norm of an image token's value, relative to the largest one."""
    norm = v[:, :, n_text:].pow(2).sum(dim=(1, 3)).sqrt()
    return 1 - norm / norm.amax(dim=1, keepdim=True)


def cell_bonus(score: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """0.4 for the best token of every 1x2x2 cell, else 0, ``[B, N]``; cells at odd edges are smaller."""
    frames, height, width = grid
    best = []
    for f in range(frames):
        for top in range(0, height, 2):
            for left in range(0, width, 2):
                rows, columns = range(top, min(top + 2, height)), range(left, min(left + 2, width))
                numbers = [(f * height + r) * width + c for r in rows for c in columns]
                cell = torch.tensor(numbers, device=score.device)
                best.append(cell[score[:, cell].argmax(dim=1)])
    return torch.zeros_like(score).scatter(1, torch.stack(best, dim=1), 0.4)
