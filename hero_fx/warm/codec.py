"""Plain data as JSON and back: dataclasses of given kinds, tuples, sets, dicts, PyTorch's dtypes, devices and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

__all__ = ["Codec"]

_KIND = "is"
_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "frozenset": frozenset,
    "Size": torch.Size,
}


class Codec:
    """Writes and reads values of JSON, the containers above, and dataclasses of these kinds."""

    def __init__(self, *kinds: type) -> None:
        self._kinds = {kind.__name__: kind for kind in kinds}

    def encode(self, value: Any) -> Any:
        """What `json.dumps` takes.

        Raises:
            TypeError: a value of another kind.
        """
        kind = type(value).__name__
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, torch.dtype):
            return {_KIND: "dtype", "of": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {_KIND: "device", "of": str(value)}
        if kind in _CONTAINERS:
            items = sorted(value) if kind == "frozenset" else value
            return {_KIND: kind, "of": [self.encode(item) for item in items]}
        if isinstance(value, dict):
            return {_KIND: "dict", "of": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if is_dataclass(value) and self._kinds.get(kind) is type(value):
            of = {f.name: self.encode(getattr(value, f.name)) for f in fields(value) if f.init}
            return {_KIND: kind, "of": of}
        raise TypeError(f"{value!r} is a {kind}, which no file can hold")

    def decode(self, data: Any) -> Any:
        """The value that `encode` was given."""
        if not isinstance(data, dict):
            return data
        kind, of = data[_KIND], data["of"]
        if kind == "dtype":
            return getattr(torch, of)
        if kind == "device":
            return torch.device(of)
        if kind in _CONTAINERS:
            return _CONTAINERS[kind]([self.decode(item) for item in of])
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in of}
        return self._kinds[kind](**{name: self.decode(item) for name, item in of.items()})
