"""A forecast of outputs in plain eager PyTorch, which looks at no branch: the definition of correct for policy "forecast"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def forecast(theta: Sequence[Tensor], v: Sequence[Tensor], x: Sequence[Tensor], x_k: Tensor | None) -> Tensor:
    """The output at step k from those of the last full steps i > j > l, ``v = (v_i, v_j, v_l)``, and the latents.

    ``(1 + t0) v_i + t1 (v_i - v_j) + t2 (v_i - v_l) + t3 (x_k - x_i) + t4 (x_i - x_j)``. Steps that there were not are
    zeros; a shorter ``v`` has no further terms, and without a latent (x_k is None) the last two are left out.
    """
    result = (1 + theta[0]) * v[0]
    for t, before in zip(theta[1:], v[1:], strict=False):
        result = result + t * (v[0] - before)
    if x_k is not None:
        result = result + theta[3] * (x_k - x[0]) + theta[4] * (x[0] - x[1])
    return result


def forecast_trajectory(
    model: Callable[[int], Tensor],
    theta: Tensor,
    mask: Sequence[bool],
    latent: Callable[[int], Tensor] | None,
    history: int = 3,
) -> Iterator[Tensor]:
    """Yield the output of every step; ``theta [T, 5, ...]`` broadcasts to outputs.

    model, latent: step -> output, noisy latent of its inputs; asked for when the step is due.
    """
    v: list[Tensor] = []
    x: list[Tensor] = []
    for step, full in enumerate(mask):
        x_k = None if latent is None else latent(step)
        if full:
            out = model(step)
            v = [out, *v]
            x = [] if x_k is None else [x_k, *x]
        else:
            none = torch.zeros_like(v[0])
            past_v = (v + [none] * history)[:history]
            out = forecast(list(theta[step]), past_v, x if x_k is None else ([*x, torch.zeros_like(x_k)])[:2], x_k)
        yield out
