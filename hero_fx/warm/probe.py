"""A compiled model can be asked where a graph's inputs come from, by a call that reaches the stepper but runs no graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hero_fx.runtime.stepper import Stepper

__all__ = ["Probe", "current_probe", "probing"]

Probe = Callable[["Stepper", Sequence[Any]], Any]
"""Takes what a stepper is called with, and says what it returns."""

_PROBE: ContextVar[Probe | None] = ContextVar("hero_fx_probe", default=None)


@contextmanager
def probing(probe: Probe) -> Iterator[None]:
    """Within it, in this thread or task alone, calls of compiled models go to `probe`."""
    token = _PROBE.set(probe)
    try:
        yield
    finally:
        _PROBE.reset(token)


def current_probe() -> Probe | None:
    """What calls go to, if anything."""
    return _PROBE.get()
