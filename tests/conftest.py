"""What holds for every test."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from torch._logging import _internal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# pytest listens to every logger that does not propagate; to torch that means TORCH_TRACE is on, and each graph would
# be rendered after each pass.
_internal.trace_log = logging.Logger("trace-off")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors: threads only get in each other's way."""
    torch.set_num_threads(1)
