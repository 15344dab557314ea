"""The Python stack: warnings that point at the user's line (the call of the compiled model), and which modules are running."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

import torch

from . import dynamo

__all__ = ["modules_within", "warn"]

_INSIDE = ("torch", "hero_fx", "diffusers.hooks", "accelerate.hooks")
"""Packages whose frames lie between the user's line and a warning of ours."""


def warn(message: str) -> None:
    """`warnings.warn`, as if called at the innermost line that is neither ours, PyTorch's, nor of a hook around the model.

    (`skip_file_prefixes` does this from Python 3.12 on, but would stop at the model's own code, which Dynamo runs.)
    """
    warnings.warn(message, stacklevel=_level(sys._getframe(0)))


def _level(frame: FrameType) -> int:
    """The `stacklevel`, counted from `frame`, of the user's line; 2, the caller of `frame`, if no line is the user's."""
    frames: list[FrameType] = []
    at: FrameType | None = frame
    while at is not None:
        frames.append(at)
        at = at.f_back
    # Code that Dynamo made has the name and the globals of the model's own forward: the call of the model is beyond it.
    entry = next((i for i, f in enumerate(frames) if dynamo.enters_dynamo(f)), 0)
    user = next((i for i, f in enumerate(frames) if i >= entry and not _is_inside(f)), 1)
    return user + 1


def modules_within() -> list[torch.nn.Module]:
    """The modules whose methods run between the user's call of a compiled model and here, innermost first.

    Where Dynamo gives up a model's own forward, it compiles what that calls, part by part: the model is further out then.
    """
    found: list[torch.nn.Module] = []
    at: FrameType | None = sys._getframe(1)
    while at is not None and not dynamo.enters_dynamo(at):
        module = at.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and not any(module is other for other in found):
            found.append(module)
        at = at.f_back
    return found if at is not None else []


def _is_inside(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return any(name == package or name.startswith(f"{package}.") for package in _INSIDE)
