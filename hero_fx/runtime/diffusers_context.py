"""diffusers' `cache_context(name, step_index=...)`, heard by the backend.

diffusers' pipelines wrap each call of the transformer in `cache_context("cond")` or `cache_context("uncond")`. diffusers
keeps what was said in one attribute per module, so that two threads or tasks read each other's. Here the context manager
itself is listened to, and what it says is kept in a context variable, together with the module it was said of. All of
diffusers' private API is used here (seen in 0.37 to 0.42).
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Heard", "entered", "heard", "listen"]


@dataclass(frozen=True, slots=True)
class Heard:
    """What the innermost `cache_context` of this thread or task says."""

    module: weakref.ref[torch.nn.Module]
    name: str
    step_index: int | None


_HEARD: ContextVar[Heard | None] = ContextVar("hero_fx_cache_context", default=None)


def heard(is_of: Callable[[torch.nn.Module], bool]) -> Heard | None:
    """What is said of a call of the model that `is_of` knows, if anything is."""
    said = _HEARD.get()
    module = None if said is None else said.module()
    return said if module is not None and is_of(module) else None


def listen() -> None:
    """Listens to the cache contexts of all models of diffusers, if it is in use; once is enough."""
    mixin: Any = getattr(sys.modules.get("diffusers.models.cache_utils"), "CacheMixin", None)
    original = getattr(mixin, "cache_context", None)
    if original is None or hasattr(original, "_hero_fx"):
        return

    @functools.wraps(original)
    @contextmanager
    def cache_context(self: torch.nn.Module, name: str, **kwargs: Any) -> Iterator[None]:
        token = _HEARD.set(Heard(weakref.ref(self), name, kwargs.get("step_index")))
        try:
            with original(self, name, **kwargs):
                yield
        finally:
            try:
                _HEARD.reset(token)
            except ValueError:  # left in another context than entered: a generator whose pieces ran in several threads
                _HEARD.set(None)

    cache_context._hero_fx = True  # type: ignore[attr-defined]
    mixin.cache_context = cache_context


def entered(module: torch.nn.Module | None) -> Heard | None:
    """The context that a module was in before anyone listened: only the suspended generator of its `cache_context` still
    holds it. Where there are several, none is taken for this thread's."""
    # Asked first, since looking through all objects there are takes a while.
    if module is None or not hasattr(module, "cache_context") or _HEARD.get() is not None:
        return None
    found = [
        frame.f_locals
        for holder in gc.get_referrers(module)
        if (frame := getattr(holder, "gi_frame", None)) is not None and frame.f_code.co_name == "cache_context"
    ]
    if len(found) != 1:
        return None
    return Heard(weakref.ref(module), found[0]["name"], found[0].get("kwargs", {}).get("step_index"))
