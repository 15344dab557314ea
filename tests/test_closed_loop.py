"""Coefficients that are fitted again to trajectories that follow the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor, nn

import hero_fx
from hero_fx.calibration.closed_loop import Solver

from .support import tiny, toys
from .support.forecasts import Conditioned
from .support.steps_by_hand import numbers

STEPS = 12


def series(n: int, *, seed: int) -> Tensor:
    """Changes of n latents or outputs: [n, scenes, frames, positions, channels]."""
    return numbers(n, 2, 1, 20, 3, seed=seed)


# -------------------------------------------------------------------------------------------------------- the solver
def test_how_a_solver_combines_is_found() -> None:
    """Two latents; the next of each is made of itself, of both outputs, and of those of the step before."""
    x, v, x_before, v_before = (series(2, seed=seed) for seed in range(4))
    then = torch.stack(
        [
            0.9 * x[0] - 0.2 * v[0] + 0.1 * v[1] + 0.05 * x_before[0] - 0.03 * v_before[1],
            0.8 * x[1] + 0.3 * v[1] - 0.04 * x_before[1],
        ]
    )
    solver = Solver.of(x, v, x_before, v_before, then)
    torch.testing.assert_close(solver.outputs, torch.tensor([[-0.2, 0.1], [0.0, 0.3]]).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(solver.explained, torch.ones(2).double())
    torch.testing.assert_close(solver.next(x, v, x_before, v_before), then)


def test_noise_of_a_solver_is_not_explained() -> None:
    x, v, noise = (series(1, seed=seed) for seed in range(3))
    solver = Solver.of(x, v, 0 * x, 0 * v, 0.1 * x - 0.1 * v + noise)
    assert float(solver.explained) < 0.2
    assert float(solver.correction(x, torch.tensor([True])).norm()) < 0.2 * float((x / 0.1).norm())


def test_nothing_is_asked_for_where_nothing_differs() -> None:
    zero = 0 * series(1, seed=0)
    solver = Solver.of(zero, zero, zero, zero, zero)
    assert not solver.correction(series(1, seed=1), torch.tensor([True])).any()


def test_a_correction_leads_back() -> None:
    x, v, wanted = series(2, seed=0), series(2, seed=1), series(1, seed=2).expand(2, -1, -1, -1, -1)
    both = torch.tensor([[-0.1, -0.3], [-0.1, -0.3]])
    solver = Solver.of(x, v, 0 * x, 0 * v, 0.9 * x + torch.einsum("ij,j...->i...", both, v))
    found = solver.correction(wanted, torch.tensor([True, True]))
    torch.testing.assert_close(solver.next(0 * x, found, 0 * x, 0 * v), wanted, atol=0, rtol=0.05)
    alone = solver.correction(wanted, torch.tensor([False, True]))
    assert not alone[0].any()
    torch.testing.assert_close(solver.next(0 * x, alone, 0 * x, 0 * v), wanted, atol=0, rtol=0.1)


def test_an_output_without_weight_is_left_alone() -> None:
    """As the unconditional half where there is no guidance yet: what it is asked for is no more than others would be."""
    x, v, wanted = series(2, seed=0), series(2, seed=1), series(1, seed=2).expand(2, -1, -1, -1, -1)
    solver = Solver.of(x, v, 0 * x, 0 * v, x + torch.einsum("ij,j...->i...", torch.tensor([[1e-4, -0.3]] * 2), v))
    found = solver.correction(wanted, torch.tensor([True, False]))
    assert float(found.norm()) < 0.05 * float((wanted / 0.3).norm())


# ------------------------------------------------------------------------------------------------------ calibrations
def euler(model: Any, i: int) -> Tensor:
    x = numbers(1, 3, 4, 5, seed=100 + i)
    for time in toys.times(STEPS, batch=1):
        x = x - model(x, time) / STEPS
    return x


def multistep(model: Any, i: int) -> Tensor:
    """A solver that combines outputs of several steps, and corrects its latent after the call."""
    solver: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    solver.set_timesteps(STEPS)
    x = numbers(1, 3, 4, 5, seed=100 + i)
    for time in solver.timesteps:
        x = solver.step(model(x, time.expand(1).float()), time, x, return_dict=False)[0]
    return x


def guided_by_two_calls(model: Any, i: int) -> Tensor:
    x = numbers(1, 3, 4, 5, seed=100 + i)
    for time in toys.times(STEPS, batch=1):
        having, without = model(x + 0.3, time), model(x, time)
        x = x - (without + 2 * (having - without)) / STEPS
    return x


def guided_in_the_batch(model: Any, i: int) -> Tensor:
    x = numbers(1, 3, 4, 5, seed=100 + i)
    for step, time in enumerate(toys.times(STEPS, batch=2)):
        without, having = model(torch.cat([x, x + 0.1]), time).chunk(2)
        x = x - (having + 2 * (step / (STEPS - 1)) ** 3 * (having - without)) / STEPS
    return x


RUNS: dict[str, tuple[Callable[[Any, int], Tensor], dict[str, Any]]] = {
    "one call": (euler, {}),
    "several steps": (multistep, {}),
    "two calls": (guided_by_two_calls, {}),
    "halves": (guided_in_the_batch, {"by": ("batch",)}),
    "halves with full steps of their own": (guided_in_the_batch, {"apart": True}),
}


def calibrated(run: Callable[[Any, int], Tensor], **options: Any) -> hero_fx.Calibration:
    usual: dict[str, Any] = {"num_steps": STEPS, "budget": 4, "scenes": 4, "search": 1, "inner": tiny.INNER}
    return hero_fx.calibrate(Conditioned().eval().requires_grad_(False), run, **{**usual, **options})


@pytest.mark.parametrize(
    "name",
    # Halves with full steps of their own have coefficients of their own too.
    [pytest.param(name, marks=pytest.mark.exhaustive) if name == "halves" else name for name in RUNS],
)
def test_the_closed_loop_is_nearer(name: str) -> None:
    """On trajectories that were not fitted, with the same full steps."""
    run, options = RUNS[name]
    found, before = (calibrated(run, closed_loop=rounds, **options) for rounds in (1, 0))
    assert "fitted again: in the closed loop, round 1" in str(found.plan)
    assert found.plan.timelines[0].levels == before.plan.timelines[0].levels
    assert found.candidates[0].error["sample"] < 0.9 * before.candidates[0].error["sample"]


def test_trajectories_lead_where_the_fit_says() -> None:
    """A model that is linear in its latent: then what each step was fitted to is what it is given, and a second round has
    nothing to correct."""

    class Linear(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample * torch.sin(timestep / 200)[:, None, None, None] + torch.cos(timestep / 200).mean()

    tables = []
    for rounds in (1, 2):
        found = hero_fx.calibrate(
            Linear().eval(), euler, num_steps=STEPS, budget=4, search=1, closed_loop=rounds, inner="eager"
        )
        tables.append(found.plan.timelines[0].coefficients["out0"])
    torch.testing.assert_close(*tables, atol=1e-4, rtol=1e-3)


def test_chunks_of_a_video_are_fitted_by_phase() -> None:
    def chunks(model: Any, i: int) -> Tensor:
        return torch.cat([euler(model, 3 * i + chunk) for chunk in range(3)])

    found, before = (calibrated(chunks, phases=2, scenes=2, holdout=1, closed_loop=rounds) for rounds in (1, 0))
    assert found.candidates[0].error["sample"] < 0.9 * before.candidates[0].error["sample"]
    first, rest = (line.coefficients["out0"] for line in found.plan.timelines)
    assert not torch.equal(first, rest)


def test_the_best_round_is_kept() -> None:
    """One trajectory that is told apart from the rest by a bad score: rounds that lead further off are not taken."""
    worse = iter(range(1, 100))

    def distances(sample: Tensor, reference: Tensor) -> dict[str, float]:
        return {"sample": float(next(worse))}

    found, before = (calibrated(euler, closed_loop=rounds, distances=distances) for rounds in (2, 0))
    assert torch.equal(*(of.plan.timelines[0].coefficients["out0"] for of in (found, before)))


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    runs = list[int]()

    def counted(model: Any, i: int) -> Tensor:
        runs.append(i)
        return euler(model, i)

    first = calibrated(counted, folder=tmp_path)
    runs.clear()
    again = calibrated(counted, folder=tmp_path)
    assert len(runs) == 4 + 2 + 1, "in full, fitted and held out, and one call that compiles"
    assert torch.equal(*(of.plan.timelines[0].coefficients["out0"] for of in (first, again)))


def test_nothing_is_fitted_again_where_all_steps_are_full() -> None:
    assert calibrated(euler, budget=STEPS).candidates[0].error["sample"] == 0
