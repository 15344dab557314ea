"""Coefficients for the trajectory that a plan itself leads to.

Least squares on full compute take past outputs and latents to be full compute's. In a run that follows the plan they are not:
what a forecast misses moves the latent, and with it all that follows. So the coefficients of a schedule are fitted again, in
the closed loop, such that every cached step leads back to full compute. Solvers combine linearly, and with Δ the change of a
latent x or an output v between two runs from the same noise,

    Δx_{k+1} = a_k Δx_k + B_k Δv_k + the same of step k - 1.

A run that follows the plan, beside full compute, gives a and B by least squares. A cached step should then give the v_k that
makes x_{k+1} full compute's, and its coefficients are the least squares of that on the past of the closed loop. Steps are
fitted in their order, for what one corrects, the next need not. What the model would give at a full step whose latent has
changed is taken to be linear too, Δv = ρ Δx with ρ by channel from the same run; a run with the new coefficients shows how
good that was, and the next round starts from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hero_fx.passes.rewrite.forecast import THETAS, OutputRule, combination
from hero_fx.passes.slots import Term

from .samples import Track
from .solve import Past, fit, gram

__all__ = ["Solver", "refit"]

LEAST = 0.03
"""Of the weight of all outputs in the next latent, what an output must have to be asked for a correction: the unconditional
half has next to none where guidance is weak."""


@dataclass(frozen=True, slots=True)
class Solver:
    """How a step's latents and outputs lead to the next latents. n: lanes times rows of the batch."""

    now: Tensor
    """[n]: a, of the latent."""
    outputs: Tensor
    """[n, n]: B; row: the next latent, column: the output."""
    before: Tensor
    """[n]: of the latent of the step before."""
    outputs_before: Tensor
    """[n, n]: of the outputs of the step before."""
    explained: Tensor
    """[n]: share of the change of the next latent that all this explains."""

    @classmethod
    def of(cls, x: Tensor, v: Tensor, x_before: Tensor, v_before: Tensor, then: Tensor) -> Solver:
        """Least squares for changes [n, ...] of latents and outputs, those of the step before, and of the next latents."""
        n = len(x)
        found, shares = [], []
        for own in range(n):
            columns = torch.stack([x[own], x_before[own], *v, *v_before]).flatten(1).double()
            wanted = then[own].flatten().double()
            sizes = columns.norm(dim=1).clamp(min=1e-30)
            table = columns / sizes[:, None]
            weights = torch.linalg.pinv(table @ table.T, hermitian=True, rtol=1e-12) @ (table @ wanted)
            rest = (wanted - weights @ table).square().sum() / wanted.square().sum().clamp(min=1e-30)
            found.append(weights / sizes)
            shares.append((1 - rest).clamp(min=0) * bool(wanted.any()))
        weights = torch.stack(found)
        return cls(weights[:, 0], weights[:, 2 : 2 + n], weights[:, 1], weights[:, 2 + n :], torch.stack(shares))

    def next(self, x: Tensor, v: Tensor, x_before: Tensor, v_before: Tensor) -> Tensor:
        """The change of the next latents."""
        parts = [_scaled(self.now, x), _mixed(self.outputs, v)]
        return parts[0] + parts[1] + _scaled(self.before, x_before) + _mixed(self.outputs_before, v_before)

    def correction(self, wanted: Tensor, cached: Tensor) -> Tensor:
        """The change of the cached outputs (bool [n]) that changes the next latents as wanted, and no more than it has to."""
        own = self.outputs[:, cached]
        square = own.T @ own + LEAST * self.outputs.square().sum() * torch.eye(int(cached.sum()), dtype=own.dtype)
        found = torch.zeros_like(wanted)
        found[cached] = _mixed(torch.linalg.pinv(square, hermitian=True) @ own.T, _scaled(self.explained, wanted))
        return found


def _scaled(weights: Tensor, values: Tensor) -> Tensor:
    return weights.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1)) * values


def _mixed(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("ij,j...->i...", weights.to(values.dtype), values)


def refit(
    rule: OutputRule, full: Sequence[Track], own: Sequence[Track], schedules: Sequence[Sequence[bool]], *, apart: bool
) -> list[Tensor]:
    """Coefficients [groups, frames, channels, cached steps, 5] for each lane, or for each part of the batch if they are apart.

    Args:
        full: trajectories of full compute.
        own: the same from the same noise, by the plan.
        schedules: of each lane, or of each part.
    """
    X, V, x, v = (
        _units(of, rule.table, apart)
        for of in (
            [t.latents for t in full],
            [t.outputs for t in full],
            [t.latents for t in own],
            [t.outputs for t in own],
        )
    )
    steps, units, each = v.shape[:3]
    X, V, x, v = (of.flatten(1, 2) for of in (X, V, x, v))  # [T, n, scenes, frames, positions, channels]
    x_new, v_new = [x[0]], list[Tensor]()
    thetas: list[list[Tensor]] = [[] for _ in range(units)]
    zero = torch.zeros_like(x[0])
    for k in range(steps):
        back = max(k - 1, 0)
        change = x_new[k] - x[k]
        past = (x_new[back] - x[back], v_new[back] - v[back]) if k else (zero, zero)
        new = v[k] + _response(x[k] - X[k], v[k] - V[k]) * change
        cached = torch.tensor([not schedule[k] for schedule in schedules]).repeat_interleave(each)
        solver = None
        if k + 1 < steps:
            before = (x[back] - X[back], v[back] - V[back]) if k else (zero, zero)
            solver = Solver.of(x[k] - X[k], v[k] - V[k], *before, x[k + 1] - X[k + 1])
        if cached.any():
            new[cached] = V[k][cached]
            if solver is not None:
                new += solver.correction(X[k + 1] - x[k + 1] - solver.next(change, new - v[k], *past), cached)
        v_new.append(new)
        for unit in range(units):
            if not schedules[unit][k]:
                rows = slice(unit * each, (unit + 1) * each)
                fulls = [step for step in range(k) if schedules[unit][step]][:-4:-1]
                theta = _solve(rule, [*reversed(fulls), k], v_new, x_new, rows)
                thetas[unit].append(theta)
                new[rows] = _forecast(rule, theta, k, fulls, v_new, x_new, rows)
        if solver is not None:
            x_new.append(x[k + 1] + solver.next(change, new - v[k], *past))
    sizes = each if rule.groups > 1 else 1, v.shape[3] if rule.frames is not None else 1, v.shape[-1], 0, THETAS
    return [torch.stack(of, dim=-2) if of else torch.zeros(sizes) for of in thetas]


def _units(tracks: Sequence[Mapping[str, Tensor]], table: str, apart: bool) -> Tensor:
    """[T, units, rows, scenes, frames, positions, channels]; units are lanes, or parts of the batch."""
    values = torch.stack([track[table] for track in tracks], dim=3)
    return values.transpose(1, 2) if apart else values


def _response(x: Tensor, v: Tensor) -> Tensor:
    """ρ: how an output changes with its latent, [n, 1, 1, 1, channels]."""
    rest = (1, 2, 3)
    return (x * v).sum(rest, keepdim=True) / x.square().sum(rest, keepdim=True).clamp(min=1e-30)


def _solve(rule: OutputRule, steps: Sequence[int], v: Sequence[Tensor], x: Sequence[Tensor], rows: slice) -> Tensor:
    """θ [groups, frames, channels, 5] of the last of these steps, from the others."""
    values = torch.stack([of[step][rows] for of in (v, x) for step in steps])
    grams = gram(values.double().permute(2, 1, 3, 5, 0, 4)).mean(dim=0)  # [rows, frames, channels, M, M]
    if rule.groups == 1:
        grams = grams.mean(dim=0, keepdim=True)
    if rule.frames is None:
        grams = grams.mean(dim=1, keepdim=True)
    last = len(steps) - 1
    past = Past(last, tuple(reversed(range(last))))
    theta = fit(grams.flatten(0, 2), [past], steps=len(steps), history=rule.history, latent=True).theta
    return theta[:, 0].reshape(*grams.shape[:3], -1).float()


def _forecast(
    rule: OutputRule, theta: Tensor, k: int, fulls: Sequence[int], v: Sequence[Tensor], x: Sequence[Tensor], rows: slice
) -> Tensor:
    terms = [value[:, None, :, None] for value in theta.unbind(-1)]  # over scenes and positions
    known = {Term("x"): x[k]}
    for number, step in enumerate(fulls):
        known |= {Term("v", number): v[step], Term("x", number): x[step]}
    found = combination(terms, rule).items()
    return sum((weight * known[term][rows] for term, weight in found if term in known), torch.zeros(()))
