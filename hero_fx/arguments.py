"""Checking arguments: one wording for all, which names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["is_number", "is_whole", "one_of", "triple", "whole_number"]


def is_number(value: object) -> bool:
    """True for an int or a float, and not for a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object, least: int | None = None) -> bool:
    """True for an int of at least `least`, and not for a truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def whole_number(name: str, value: object, least: int | None, more: str = "") -> None:
    """Raises ValueError unless `value` is an int of at least `least`; `more` says what it is for."""
    if not is_whole(value, least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name}={value!r} must be a whole number{bound}{' ' + more if more else ''}")


def one_of(name: str, value: object, allowed: Sequence[object], more: str = "") -> None:
    """Raises ValueError unless `value` is allowed; `more` names what is allowed beside that."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{' ' + more if more else ''}")


def triple(name: str, value: object, more: str = "") -> None:
    """Raises ValueError unless `value` is (frames, height, width), each at least 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(is_whole(v, 1) for v in value):
        raise ValueError(
            f"{name}={value!r} must be three whole numbers (frames, height, width) of at least 1, such as (1, 2, 3){more}"
        )
