"""Fixtures of all tests, and what is set once for a process of tests."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._logging import _internal

import hero_fx

from . import toys
from .quick import close_quickly, collect_seldom, compile_quickly

torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way

compile_quickly()
close_quickly()

# pytest listens to every logger that does not propagate; to torch that means TORCH_TRACE is on, and each graph would
# be rendered after each pass.
_internal.trace_log = logging.Logger("trace-off")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread again after each test: examples set as many as they are told, and all tests behind them would wait for each
    other's."""
    yield
    torch.set_num_threads(1)


gc.disable()  # while tests are imported


@pytest.fixture(autouse=True, scope="session")
def imports_are_no_garbage() -> Iterator[None]:
    collect_seldom()
    yield
    gc.freeze()  # pytest and Python would walk all that the tests have made, several times, to end the process


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before or behind a test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled_toy() -> tuple[Any, hero_fx.Backend]:
    torch._dynamo.reset()
    return toys.compiled(warmup=1, cooldown=0)


@pytest.fixture
def toy(compiled_toy: tuple[Any, hero_fx.Backend]) -> Iterator[tuple[Any, hero_fx.Backend]]:
    """One that the tests of a module share, without trajectories."""
    hero_fx.reset()
    yield compiled_toy
    hero_fx.reset()


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Gradients are off."""
    with torch.no_grad():
        yield
