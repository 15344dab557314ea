"""What holds for every test."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

# Read when torch is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A pool of processes takes longer to start than tests compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Else a program for each set of vector instructions is compiled.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch
from torch._dynamo.utils import counters
from torch._logging import _internal

import hero_fx

from .support import toys
from .support.quick import close_quickly, collect_seldom, compile_quickly

torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way

compile_quickly()
close_quickly()

# pytest listens to every logger that does not propagate; to torch that means TORCH_TRACE is on, and each graph would
# be rendered after each pass.
_internal.trace_log = logging.Logger("trace-off")


LONG = ("test_ranks.py", "test_warm_start.py", "test_many_requests.py")
"""Files with single tests or fixtures of a quarter of a minute and more: at the end of a run one worker would wait for them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _by_model(items)
    items.sort(key=lambda item: item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _by_model(items: list[pytest.Item]) -> None:
    """Tests of one model of the zoo stand in a row, so that one worker has most of them: each worker traces it once."""
    places = [i for i, item in enumerate(items) if item.path.name == "test_zoo.py"]
    for i, item in zip(places, sorted((items[i] for i in places), key=_model_of), strict=True):
        items[i] = item


def _model_of(item: pytest.Item) -> str:
    parameters: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    return str(parameters.get("name", ""))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread again after each test: examples set as many as they are told, and all tests behind them would wait for each
    other's."""
    yield
    torch.set_num_threads(1)


gc.disable()  # while tests are imported


@pytest.fixture(autouse=True, scope="session")
def imports_are_no_garbage() -> None:
    collect_seldom()


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
