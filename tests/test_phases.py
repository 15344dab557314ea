"""Autoregressive models: chunk after chunk, each denoised through the same timesteps, then a call that writes a memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Plan, Timeline

from .reference_forecast import forecast_trajectory
from .support import toys
from .support.forecasts import theta
from .support.steps_by_hand import numbers

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TIMES = (1000.0, 800.0, 600.0, 400.0, 200.0, 0.0)
"""The last one is of the call that writes the memory."""
MASKS = ((True, True, False, False, True, True), (True, False, True, False, False, True))
CHUNKS = 4


class Chunked(nn.Module):
    """A convolution on the latents of a chunk and on the memory of the chunk before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.remember = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
        self.time = nn.Linear(1, 3)
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, timestep: Tensor, memory: Tensor) -> Tensor:
        time = self.time(timestep[:, None] / 1000)[:, :, None, None]
        return torch.tanh(self.conv(latents) + self.remember(memory) + time)


MODEL = Chunked()


def video(i: int, denoise: Any, *, view: bool = False) -> Tensor:
    """All chunks; `denoise(chunk, x, memory)` gives the outputs of a chunk that starts from the noise x. `view`: the memory
    is another tensor for each chunk, with other strides from the second one on."""
    memory, made = torch.zeros(1, 2, 4, 5), []
    with torch.no_grad():
        for chunk in range(CHUNKS):
            x = numbers(1, 3, 4, 5, seed=100 * i + chunk)
            *outputs, last = denoise(chunk, x, memory)
            made.append(x - sum(outputs) / len(outputs))
            memory = last[:, :2] if view else memory.copy_(last[:, :2])
    return torch.stack(made)


def run(model: Any, i: int, *, view: bool = False) -> Tensor:
    def denoise(_: int, x: Tensor, memory: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        for t in TIMES:
            outputs.append(model(x, torch.tensor([t]), memory))
            x = x - outputs[-1] / (len(TIMES) - 1)
        return outputs

    return video(i, denoise, view=view)


def by_reference(i: int, lines: tuple[Timeline, ...]) -> Tensor:
    """Each chunk by the equation, from nothing of the chunks before."""

    def denoise(chunk: int, x: Tensor, memory: Tensor) -> list[Tensor]:
        line, outputs, now = lines[min(chunk, len(lines) - 1)], list[Tensor](), [x]
        outs = forecast_trajectory(
            lambda step: MODEL(now[-1], torch.tensor([TIMES[step]]), memory),
            line.coefficients["out0"], line.schedule, lambda _: now[-1],
        )  # fmt: skip
        for out in outs:
            outputs.append(out)
            now.append(now[-1] - out / (len(TIMES) - 1))
        return outputs

    return video(i, denoise)


def line(phase: int) -> Timeline:
    table = theta(1, 3, 1, 1, steps=len(TIMES), seed=phase)
    return Timeline(schedule=MASKS[phase], timesteps=TIMES, coefficients={"out0": table}, phase=phase)


RULE = OutputRule(index=0, axis=1, latent="latents")
PLAN = Plan(policy="forecast", timelines=(line(0), line(1)), outputs=(RULE,))


def test_each_chunk_follows_its_phase_and_the_last_one_all_that_follow() -> None:
    backend = hero_fx.backend(plan=PLAN, inner="aot_eager")
    call = toys.torch_compile(MODEL, backend, fullgraph=True)
    for i in (0, 1):
        with hero_fx.session(f"video-{i}"):
            torch.testing.assert_close(run(call, i), by_reference(i, PLAN.timelines), rtol=1e-5, atol=1e-6)
    assert backend.stats().full_steps == 2 * (4 + 3 * 3)
    # The first chunk has a graph of its own: chunks are counted over both.
    with hero_fx.session("strides"):
        torch.testing.assert_close(run(call, 2, view=True), by_reference(2, PLAN.timelines), rtol=1e-5, atol=1e-6)
    assert backend.stats().graphs == 2
    # A chunk that fails half-way is the same chunk when it is begun anew.
    with hero_fx.session("again"), torch.no_grad():
        x, memory = numbers(1, 3, 4, 5, seed=0), torch.zeros(1, 2, 4, 5)
        for t in TIMES[:2]:
            call(x, torch.tensor([t]), memory)
        torch.testing.assert_close(run(call, 0), by_reference(0, PLAN.timelines), rtol=1e-5, atol=1e-6)
    # Without a session, the first chunk of a video looks like the next one of the video before.
    with pytest.raises(hero_fx.AmbiguousCall, match=r"first 2 trajectories \(phases\) of a video.*hero_fx.session"):
        run(call, 0)


def test_calibration_learns_a_schedule_and_coefficients_for_each_phase() -> None:
    given: dict[str, Any] = {
        "num_steps": len(TIMES), "budget": 4, "scenes": 2, "holdout": 1, "search": 6, "inner": "eager", "full_steps": (5,),
    }  # fmt: skip
    found = hero_fx.calibrate(MODEL, run, phases=2, **given)
    assert [t.phase for t in found.plan.timelines] == [0, 1]
    assert all(t.schedule[5] and t.full == 4 for t in found.plan.timelines)
    first, later = (t.coefficients["out0"] for t in found.plan.timelines)
    assert not torch.equal(first, later)
    # What is reported is what comes out, by the equation too.
    full = run(MODEL, 2)
    off = float((by_reference(2, found.plan.timelines) - full).norm() / full.norm())
    assert found.candidates[0].error["sample"] == pytest.approx(off, rel=1e-3)
    assert " ".join(t.strip for t in found.plan.timelines) in str(found)
    # One phase for all chunks needs no session.
    pooled = hero_fx.calibrate(MODEL, run, **given | {"search": 1}).plan
    assert pooled.phases == 1
    call = toys.torch_compile(MODEL, hero_fx.backend(plan=pooled, inner="eager"), fullgraph=True)
    torch.testing.assert_close(run(call, 7), by_reference(7, pooled.timelines), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        BackendCompilerFailed, match=r"compiled a second time .*same shapes and strides .*'memory' stride"
    ):
        hero_fx.calibrate(MODEL, lambda model, i: run(model, i, view=True), phases=2, **given)
    with pytest.raises(ValueError, match=r"phases=5, but run\(model, 0\) made 4 trajectories"):
        hero_fx.calibrate(MODEL, run, phases=5, **given)


class Writing(Chunked):
    """It writes its memory itself, at every call."""

    def forward(self, latents: Tensor, timestep: Tensor, memory: Tensor) -> Tensor:
        out = super().forward(latents, timestep, memory)
        memory.copy_(out[:, :2] + memory / 2)
        return out


def test_what_a_model_writes_is_written_at_cached_steps_too() -> None:
    """Right, only slower; and that another value is in it at each call starts no trajectory."""
    model, of = Writing(), line(0)
    backend = hero_fx.backend(plan=Plan(policy="forecast", timelines=(of,), outputs=(RULE,)), inner="aot_eager")
    call = toys.torch_compile(model, backend, fullgraph=True)
    inputs = [(numbers(1, 3, 4, 5, seed=n), torch.tensor([t])) for n, t in enumerate(TIMES)]
    ours, theirs = torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4, 5)

    def latent(step: int) -> Tensor:
        if not of.schedule[step]:
            model(*inputs[step], theirs)
        return inputs[step][0]

    with torch.no_grad():
        outs = forecast_trajectory(
            lambda step: model(*inputs[step], theirs), of.coefficients["out0"], of.schedule, latent
        )
        for given, expected in zip(inputs, outs, strict=True):
            torch.testing.assert_close(call(*given, ours), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (backend.stats().full_steps, backend.stats().cached_steps) == (4, 2)
