"""What a model's code sees of its modules beside weights: classes and attributes. Step graphs have it baked in.

Under `torch.compile` Dynamo guards it. A loaded model has no guards: it is compared with what it was when it was saved, once,
when it is loaded, and watched from then on.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Watched", "differences", "snapshot"]

_IGNORED = frozenset(
    {
        "_parameters", "_buffers", "_modules",  # compared by name where a graph has them as inputs
        "_internal_dict",  # diffusers' configuration, of which the fingerprint has what counts
        "_diffusers_hook",  # made by its cache_context; caches put a `forward` into the module
        "_compiled_call_impl", "_is_torch_compile",  # set by torch.compile
    }
)  # fmt: skip
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_DEPTH = 3


def snapshot(model: nn.Module) -> dict[str, str]:
    """Class and attributes of each module, as text by `name.attribute`."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        path = name or "the model"
        found[path] = _name(type(module))
        for attribute, value in _attributes(module):
            if not (isinstance(value, MutableMapping) and not value):  # hooks that no one put
                found[f"{path}.{attribute}"] = _text(value, _DEPTH)
    return found


def differences(then: Mapping[str, str], now: Mapping[str, str], most: int = 5) -> list[str]:
    """What differs, one phrase each: `blocks.0.scale is 2.0 here and 1.0 in the file`."""
    found = [
        f"{name} is {now.get(name, 'missing')} here and {then.get(name, 'missing')} in the file"
        for name in dict.fromkeys((*then, *now))
        if then.get(name) != now.get(name)
    ]
    return found if len(found) <= most else [*found[:most], f"{len(found) - most} more"]


class Watched:
    """Notices, at little cost, that a model's modules are not what they were: by identity of what they hold."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[Any, Any, Any, str]] = []
        self._sizes: list[tuple[Any, int, str]] = []
        self._modules: list[tuple[dict[str, Any], int, int, str]] = []
        for name, module in model.named_modules():
            path = name or "the model"
            own = vars(module)
            self._modules.append((own, len(own), _count(own), path))
            self._hold(module._modules, path, 0)
            for attribute, value in _attributes(module):
                self._held.append((vars(module), attribute, value, path))
                self._open(value, f"{path}.{attribute}", _DEPTH)

    def _open(self, value: Any, path: str, depth: int) -> None:
        if isinstance(value, (dict, list)):
            self._hold(value, path, depth)
        elif _is_opened(value):
            self._hold(vars(value), path, depth)

    def _hold(self, container: Any, path: str, depth: int) -> None:
        """Watches what a dict or a list holds, and what that holds."""
        self._sizes.append((container, len(container), path))
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            self._held.append((container, key, value, path))
            if depth:
                self._open(value, f"{path}.{key}", depth - 1)

    def changes(self) -> list[str]:
        """What changed since; empty as a rule."""
        found = [path for container, size, path in self._sizes if len(container) != size]
        found += [path for own, size, count, path in self._modules if len(own) != size and _count(own) != count]
        if found or self._is_as_it_was():
            return found
        return [
            f"{path}.{key}"
            for container, key, value, path in self._held
            if _get(container, key) is not value and not _equal(_get(container, key), value)
        ]

    def _is_as_it_was(self) -> bool:
        try:
            return all(container[key] is value for container, key, value, _ in self._held)
        except (KeyError, IndexError):
            return False


def _get(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except (KeyError, IndexError):
        return _Missing


class _Missing:
    """In place of what is gone."""


def _equal(now: Any, then: Any) -> bool:
    return type(now) is type(then) and isinstance(then, _PLAIN) and bool(now == then)


def _count(own: Mapping[str, Any]) -> int:
    return len(own) - sum(name in own for name in _IGNORED)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name not in _IGNORED:
            yield name, value


def _is_opened(value: object) -> bool:
    """An object of a plain Python class, such as an attention processor, whose attributes code may look at."""
    return hasattr(value, "__dict__") and not isinstance(value, (*_PLAIN, *_NAMED, nn.Module, Tensor, types.ModuleType))


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _text(value: Any, depth: int) -> str:
    """The same for equal values in any process: no addresses."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, _NAMED):
        return _name(value)
    kind = _name(type(value))
    if depth == 0 or isinstance(value, (nn.Module, types.ModuleType)):
        return kind
    if isinstance(value, Mapping):
        return f"{kind}({', '.join(f'{_text(k, 0)}: {_text(v, depth - 1)}' for k, v in value.items())})"
    if isinstance(value, (set, frozenset)):
        return f"{kind}({', '.join(sorted(_text(item, depth - 1) for item in value))})"
    if isinstance(value, (tuple, list)):
        return f"{kind}({', '.join(_text(item, depth - 1) for item in value)})"
    if _is_opened(value):
        return f"{kind}({', '.join(f'{k}={_text(v, depth - 1)}' for k, v in sorted(vars(value).items()))})"
    return kind


def _tensor(value: Tensor) -> str:
    shown = f"tensor {value.dtype} {list(value.shape)}"
    if value.is_meta:
        return shown
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{shown} {hashlib.sha256(content).hexdigest()[:16]}"
