"""The fidelity bench with short trajectories, on a tiny untrained world model. A test file that wants the fixtures names them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .examples import FOLDER, example
from .tiny import randomized

STEPS, SCENES = 7, 2


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """`examples/fidelity.py`, with short trajectories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        torch._dynamo.reset()
        module = example("fidelity")
        from world.pipeline import STEPS as steps  # type: ignore[import-not-found]

        for task in steps:
            patch.setitem(steps, task, STEPS)
        yield module
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def weights(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two layers, saved."""
    from world.model import world_scheduler, world_transformer  # type: ignore[import-not-found]
    from world.pipeline import WorldModelPipeline

    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = randomized(world_transformer(layers=2, heads=2, head=16))
    WorldModelPipeline(model, world_scheduler()).save_pretrained(folder)
    return folder


def command(weights: Path, folder: Path) -> list[str]:
    """The bench on one task, with its cache beside what it writes."""
    # Of one scene each, as is the only one of converged sampling: another size would be traced anew.
    numbers = ["--scenes", str(SCENES), "--batch", "1", "--converged", "9", "--converged-scenes", "1"]
    folders = ["--weights", str(weights), "--results", str(folder), "--cache", str(folder / "cache")]
    return [*folders, *numbers, "--tasks", "reconstruction"]


def rows(results: Path) -> dict[str, Any]:
    """The rows of the main table, by name."""
    found = json.loads((results / "fidelity.json").read_text())
    return {row["name"]: row for row in found["tasks"]["reconstruction"]["main"]}
