"""The one setting of the engine plugins: the environment variable `HERO_FX`."""

from __future__ import annotations

import json
import os
from typing import Any

from hero_fx.backends import Backend, backend

__all__ = ["VARIABLE", "EngineError", "is_on", "new_backend"]

VARIABLE = "HERO_FX"


class EngineError(RuntimeError):
    """The engine is set up in a way that hero_fx cannot serve; the message says what to change."""


def is_on() -> bool:
    """Whether the environment asks for hero_fx."""
    return VARIABLE in os.environ


def new_backend(mode: str | None = None) -> Backend:
    """A backend with the options of the environment; each transformer gets one of its own.

    Args:
        mode: Inductor's mode that the engine asks for; one in `HERO_FX` wins.

    Raises:
        EngineError: the variable is no JSON object, or an option is unknown or out of range.
    """
    value = os.environ[VARIABLE]
    example = f"""for example {VARIABLE}='{{"interval": 3}}', or {VARIABLE}='{{}}' for the defaults"""
    try:
        options: Any = json.loads(value)
    except json.JSONDecodeError as error:
        raise EngineError(
            f"{VARIABLE}={value!r} is not JSON ({error}); give options of hero_fx.backend, {example}"
        ) from error
    if not isinstance(options, dict):
        raise EngineError(f"{VARIABLE}={value!r} is not a JSON object; give options of hero_fx.backend, {example}")
    try:
        return backend(**options if "inner" in options else {"mode": mode} | options)
    except (TypeError, ValueError) as error:
        raise EngineError(f"{VARIABLE}={value!r}: {error}") from error
