"""Warnings point at the user's line, from wherever in the machinery they come."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hero_fx
from hero_fx.stack import warn

from .support import toys


class Plain(nn.Module):
    """No transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, latents: Tensor, timestep: Tensor) -> Any:
        return self.linear(latents) * timestep[:, None, None]


def caught(call: Any) -> warnings.WarningMessage:
    """The one warning of a call, which is made on the line below the next."""
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        call(toys.latents(), toys.times(1)[0])  # the user's line
    (warning,) = [w for w in seen if "hero_fx" in str(w.message)]
    return warning


USERS_LINE = caught.__code__.co_firstlineno + 4


def frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("whole", [True, False], ids=["module", "in_place"])
def test_a_model_that_is_compiled_plainly_points_at_the_call(whole: bool) -> None:
    torch._dynamo.reset()
    backend, model = hero_fx.backend(inner="aot_eager", strict=False), frozen(Plain())
    if whole:
        model = toys.torch_compile(model, backend)
    else:
        model.compile(backend=backend)
    warning = caught(model)
    assert (warning.filename, warning.lineno) == (__file__, USERS_LINE)


def test_a_warning_at_run_time_points_at_the_call_too() -> None:
    """Then the model's own forward, as Dynamo rewrote it, lies between."""
    torch._dynamo.reset()

    def backend(gm: Any, inputs: Any) -> Any:
        def run(*values: Any) -> Any:
            # As within `hero_fx`, whose frames are passed over.
            exec("warn('hero_fx: at run time')", {"__name__": "hero_fx.runtime", "warn": warn})
            return gm(*values)

        return run

    warning = caught(toys.torch_compile(frozen(Plain()), backend))
    assert (warning.filename, warning.lineno) == (__file__, USERS_LINE)


def test_without_dynamo_the_caller_is_the_user() -> None:
    with pytest.warns(UserWarning, match="hero_fx: by hand") as seen:
        warn("hero_fx: by hand")
    assert seen[0].filename == __file__
