"""Leaving a context that is for one call of the model."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any

__all__ = ["leave"]


def leave(name: str, variable: ContextVar[Any], token: Token[Any], *, failed: bool) -> None:
    """Gives a variable back its value from before; `failed`: there is an error under way that is not to be hidden."""
    try:
        variable.reset(token)
    except ValueError:
        if not failed:
            raise RuntimeError(
                f"hero_fx.{name} was left in another context than it was entered in: it must not stay entered across a "
                "yield or a change of threads; put it around the call of the model alone"
            ) from None
