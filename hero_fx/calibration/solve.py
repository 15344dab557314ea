"""Least squares from Gram matrices: the best coefficients for any choice of full steps, and how far off they are.

What was recorded is only ever combined linearly, so the inner products of all recorded values, per channel, are all that is
needed: `gram[c, p, q] = <z_p, z_q>` over the sampled positions. For an output, z is its T values and then the T latents; for
features, their T values. Every regressor is a difference z_p - z_q (or z_p alone), and so is what is to be explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Fit", "Past", "fit", "gram", "past_of"]

RIDGE = 1e-3
"""Of the diagonal: holds back coefficients of regressors that hardly differ. With 1e-4 errors of the cached steps before are
amplified where schedules or trajectories are others than those that were fitted."""


@dataclass(frozen=True, slots=True)
class Past:
    """A cached step and the full steps before it, newest first."""

    step: int
    fulls: tuple[int, ...]


def past_of(schedule: Sequence[int], most: int = 3) -> list[Past]:
    """Every cached step of a schedule with its last `most` full steps."""
    found, fulls = [], list[int]()
    for step, full in enumerate(schedule):
        if full:
            fulls.insert(0, step)
        else:
            found.append(Past(step, tuple(fulls[:most])))
    return found


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients and residuals of a number of cached steps."""

    theta: Tensor
    """[cells, steps, terms]: θ0 .. of the regressors, in the order of `hero_fx.passes.forecast`."""
    error: Tensor
    """[cells, steps]: squared residual."""


def gram(values: Tensor) -> Tensor:
    """Inner products [..., M, M] of values [..., M, positions], per position."""
    return (values @ values.transpose(-2, -1)) / values.shape[-1]


def fit(gram: Tensor, pasts: Sequence[Past], *, steps: int, history: int, latent: bool, scale: bool = True) -> Fit:
    """Solves for every past at once.

    Args:
        gram: [cells, M, M], M = steps, or 2 steps with latents.
        history: how many past values are used, 1 to 3.
        latent: use the latents' differences as well.
        scale: let the newest past value be scaled (θ0).
    """
    cells, size = gram.shape[0], gram.shape[1]
    if not pasts:
        return Fit(gram.new_zeros(cells, 0, 5 if latent else 3), gram.new_zeros(cells, 0))
    gram = gram.double()
    padded = torch.zeros(cells, size + 1, size + 1, dtype=gram.dtype, device=gram.device)
    padded[:, :size, :size] = gram
    plus, minus = _regressors(pasts, steps, size, history, latent, scale)
    wanted = torch.tensor([[p.step] for p in pasts]), torch.tensor([[p.fulls[0]] for p in pasts])
    products = _inner(padded, plus, minus, plus, minus)
    right = _inner(padded, plus, minus, *wanted)
    power = _inner(padded, *wanted, *wanted)[..., 0, 0]
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    # A regressor that is missing has a row of zeros: the smallest number keeps the system regular, and its θ at 0.
    ridge = RIDGE * diagonal + 1e-12 * diagonal.amax(dim=-1, keepdim=True) + 1e-30
    theta = torch.linalg.solve(products + torch.diag_embed(ridge), right)[..., 0]
    explained = 2 * (theta * right[..., 0]).sum(-1) - (theta * (products @ theta[..., None])[..., 0]).sum(-1)
    return Fit(theta, (power - explained).clamp(min=0))


def _regressors(
    pasts: Sequence[Past], steps: int, size: int, history: int, latent: bool, scale: bool
) -> tuple[Tensor, Tensor]:
    """Positions [steps, terms] of what is taken, and of what it is taken less; `size` is the position of zero."""
    plus, minus = [], []
    for past in pasts:
        known: list[int | None] = [*past.fulls[:3], None, None, None][:3]
        i, j, third = known
        assert i is not None, "the first step is full"
        rows = [(i, size) if scale else (size, size)]
        rows.append((i, j) if j is not None and history > 1 else (size, size))
        rows.append((i, third) if third is not None and history > 2 else (size, size))
        if latent:
            rows.append((steps + past.step, steps + i))
            rows.append((steps + i, steps + j) if j is not None else (size, size))
        plus.append([a for a, _ in rows])
        minus.append([b for _, b in rows])
    return torch.tensor(plus), torch.tensor(minus)


def _inner(gram: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """<z_a - z_b, z_c - z_d> for positions [steps, terms]: [cells, steps, terms of a, terms of c]."""

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return gram[:, rows[:, :, None], columns[:, None, :]]

    return at(a, c) - at(a, d) - at(b, c) + at(b, d)
