"""Calls and models that are no batch of requests are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import hero_fx

from .support import tiny, toys
from .support.requests import Spoiled, options, single, together

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")


def test_calls_that_are_no_batch() -> None:
    call = hero_fx.calling
    for calls, message in (
        ([], "must be one hero_fx.calling"),
        (["a"], "must be one hero_fx.calling"),
        ([call(step_index=0)], r"calls\[0\] has no session"),
        ([call(session="a", step_index=0), call(session="b")], r"calls\[1\] has no step_index"),
        ([call(session="a", step_index=0), call(session="a", step_index=0)], "are of session='a' and lane=None"),
        (
            [call(session="a", lane=0, step_index=0), call(session="a", lane=1, step_index=2)],
            "session='a' is in the batch with step_index=0 and step_index=2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            hero_fx.batch(calls)  # type: ignore[arg-type]
    for buckets in ((1, 2), (), (2.5,)):
        with pytest.raises(ValueError, match="buckets="):
            hero_fx.batch([call(session="a", step_index=0)], buckets=buckets)  # type: ignore[arg-type]
    spent = call(session="a", step_index=0)
    with hero_fx.batch([spent]), pytest.raises(RuntimeError, match="used before"), spent:
        pass
    fresh = call(session="a", step_index=0)
    with hero_fx.batch([call(session="b", step_index=0)]), pytest.raises(RuntimeError, match="within another"):
        hero_fx.batch([fresh]).__enter__()
    with call(session="b", step_index=0), pytest.raises(RuntimeError, match="within another"):
        hero_fx.batch([fresh]).__enter__()


def test_what_is_refused_at_a_call() -> None:
    call, backend = toys.compiled(warmup=1, cooldown=0)
    with pytest.raises(BackendCompilerFailed, match="call the model for one such request alone before"):
        together(call, "ab", [0, 0])
    single(call, "warm-up", 0, 0)
    expected = [single(call, "c", step, 1) for step in range(2)]
    together(call, "ab", [0, 0])
    together(call, "ab", [1, 1])
    with pytest.raises(
        BackendCompilerFailed, match=r"L\['timestep'\] is .* \[1\] .* for one request, and .* \[\] .* in a batch of 2"
    ):
        together(call, "ab", [2, 2], torch.tensor(500))
    with hero_fx.batch([options(2, 9, "a"), options(2, 9, "b")]):
        call(toys.latents(2), tiny.timesteps(9)[[2, 2]])
        with pytest.raises(RuntimeError, match="called twice within one"):
            call(toys.latents(2), tiny.timesteps(9)[[2, 2]])
    both = hero_fx.batch([options(3, 9, "a"), options(3, 9, "b")])
    with both, hero_fx.calling(session="a"), pytest.raises(RuntimeError, match="entered within"):
        call(toys.latents(2), tiny.timesteps(9)[[3, 3]])
    torch.set_autocast_cache_enabled(False)
    try:
        with pytest.raises(RuntimeError, match="autocast keeps casts"):
            call(toys.latents(2), tiny.timesteps(9)[[3, 3]])
    finally:
        torch.set_autocast_cache_enabled(True)
    # A row that is refused leaves none of the others half way: they start anew, full.
    wrong = hero_fx.batch([options(0, 9, "A"), options(3, 8, "a")])
    with pytest.raises(ValueError, match="num_steps=8, but this trajectory began with num_steps=9"), wrong:
        call(torch.cat([toys.latents(1, seed=1)] * 2), tiny.timesteps(9)[[0, 3]])
    for step in range(2):
        assert tiny.worst([single(call, "A", step, 1)], [expected[step]]) < 1e-6
    assert backend.stats().graphs == 1


def counted(model: Any, x: Tensor) -> Tensor:
    model.calls.add_(1)
    result: Tensor = x + model.calls
    return result


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _, x: x * 2 if x.shape[0] > 1 else x, "does not run the same ops"),
        (lambda model, x: x * model.scale, "do not take the same tensors"),
        (counted, "the model writes to its input or buffer"),
    ],
    ids=["goes by the batch", "has changed", "writes"],
)
def test_another_program_is_refused(spoil: Any, message: str) -> None:
    model = Spoiled(spoil).eval().requires_grad_(False)
    call, _ = toys.compiled(model)
    single(call, "warm-up", 0, 0)
    model.scale = 2.0
    with pytest.raises((BackendCompilerFailed, hero_fx.NotBatched), match=message):
        together(call, "ab", [0, 0])
