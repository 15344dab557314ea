"""What holds for every test; the fixtures that all of them may use are in `support/fixtures.py`."""

from __future__ import annotations

import os

import pytest

# Read when torch is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A pool of processes takes longer to start than tests compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Else a program for each set of vector instructions is compiled.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

LONG = ("test_ranks.py", "test_warm_start.py", "test_many_requests.py")
"""Files with single tests or fixtures of a quarter of a minute and more: at the end of a run one worker would wait for them."""


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands out tests to workers needs none of it, and no torch: they would wait for its import."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", 0):
        from .support import fixtures

        config.pluginmanager.register(fixtures)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _by_model(items)
    items.sort(key=lambda item: item.path.name not in LONG)
    import torch

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
