"""Loads the scripts of `examples/`, which is a folder and no package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

FOLDER = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    """The module `examples/<name>.py`, executed again, as `python examples/<name>.py` would find its imports; or the package
    of that name there."""
    if (FOLDER / name).is_dir():
        return package(name)
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the names in their annotations
    with patch.object(sys, "path", [str(FOLDER), *sys.path]):
        spec.loader.exec_module(module)
    return module


def world(name: str) -> Any:
    """The module `examples/world/<name>.py`."""
    return package(f"world.{name}")


def package(name: str) -> Any:
    """A package of `examples/`, or a module of one, as the scripts beside it import it."""
    with patch.object(sys, "path", [str(FOLDER), *sys.path]):
        return importlib.import_module(name)
