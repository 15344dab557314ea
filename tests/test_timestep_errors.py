"""Timesteps that cannot tell the step: each error says how to fix it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .support import toys
from .support.unsupported import TIME, backend, check_message

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("time", [487, 487.0], ids=repr)
def test_timestep_that_is_a_python_number(time: float) -> None:
    fix = r"no timestep was found among .*latents.*called with a Python number for it, pass a tensor"
    check_message(lambda: toys.torch_compile(toys.toy(), backend=backend())(toys.latents(), time), fix)


def test_timestep_that_is_a_changing_python_number() -> None:
    call = toys.torch_compile(toys.toy(), backend=backend(), dynamic=True)
    fix = (
        r"no timestep was found among the graph's inputs latents \(and the Python numbers timestep\); .* pass a tensor"
    )
    check_message(lambda: call(toys.latents(), 487.0), fix)
    torch._dynamo.reset()
    lenient = toys.torch_compile(toys.toy(), backend=backend(strict=False))
    with pytest.warns(UserWarning, match="without step caching: no timestep was found") as caught:
        ours = toys.loop(lenient, toys.latents(), [487.0, 321.0, 123.0])
    assert toys.same(ours, toys.loop(toys.toy(), toys.latents(), [487.0, 321.0, 123.0]))
    assert len(caught) == 1


@pytest.mark.parametrize("timestep", ["tiemstep", 99])
def test_timestep_that_names_nothing(timestep: str | int) -> None:
    fix = f"timestep={timestep!r} names no tensor input of the graph; its tensor inputs are .*timestep.*"
    call = toys.torch_compile(toys.toy(), backend=backend(timestep=timestep))
    check_message(lambda: call(toys.latents(), TIME), fix)


@pytest.mark.parametrize("time", [torch.tensor([True, False]), torch.zeros(2, dtype=torch.complex64)], ids=str)
def test_timestep_of_no_use(time: Tensor) -> None:
    call = toys.torch_compile(toys.toy(), backend=backend())
    with torch.no_grad(), pytest.raises(ValueError, match=r"timestep has dtype .*allowed: a float or an int dtype"):
        call(toys.latents(), time)
