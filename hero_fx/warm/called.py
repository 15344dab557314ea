"""The call that a graph was compiled for: noted while Dynamo compiles it, and made again, without its values, to save it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hero_fx import dynamo
from hero_fx.passes import compat

from .signature import Conditions, SameAs, current_conditions, is_constant

__all__ = ["Called", "called"]


@dataclass(frozen=True, slots=True)
class Layout:
    """All that Dynamo looks at in a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    inference: bool
    """Made under `torch.inference_mode`."""

    def example(self) -> Tensor:
        """Such a tensor, of zeros."""
        with torch.inference_mode(self.inference), torch.no_grad():
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).zero_()


@dataclass(frozen=True, slots=True)
class Called:
    """A call without its values; keeps nothing of it alive."""

    module: weakref.ref[nn.Module]
    structure: Any
    """Of (args, kwargs), a pytree."""
    leaves: tuple[Any, ...]
    """`Layout`, `SameAs` an earlier one, or a constant."""
    unknown: tuple[str, ...]
    """Classes of arguments that are none of these."""
    conditions: Conditions
    grad: bool
    files: frozenset[str]
    """Source files of all code that was traced."""

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Such a call: (args, kwargs)."""
        values: list[Any] = []
        for leaf in self.leaves:
            match leaf:
                case Layout():
                    values.append(leaf.example())
                case SameAs(index):
                    values.append(values[index])
                case _:
                    values.append(leaf)
        args, kwargs = compat.tree_unflatten(values, self.structure)
        return tuple(args), kwargs

    @contextmanager
    def context(self, inference: bool) -> Iterator[None]:
        """Modes as they were; `inference`: inference mode is on."""
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(self.grad),
            compat.autocast(self.conditions.autocast),
        ):
            yield


def called() -> Called | None:
    """The call that Dynamo is compiling right now; None where no module is called."""
    module, frame = dynamo.frame_module(), dynamo.frame_call()
    if module is None or frame is None:
        return None
    args, kwargs = frame
    if args and args[0] is module:
        args = args[1:]
    kwargs = {name: value for name, value in kwargs.items() if value is not module}
    values, structure = compat.tree_flatten((args, kwargs))
    leaves, unknown = _leaves(values)
    return Called(
        weakref.ref(module),
        structure,
        leaves,
        unknown,
        current_conditions(),
        torch.is_grad_enabled(),
        dynamo.traced_files(),
    )


def _leaves(values: list[Any]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    leaves: list[Any] = []
    unknown: list[str] = []
    first: dict[int, int] = {}
    for index, value in enumerate(values):
        plain = type(value) is Tensor
        if plain and id(value) in first:
            leaves.append(SameAs(first[id(value)]))
        elif plain:
            first[id(value)] = index
            leaves.append(Layout(tuple(value.shape), value.stride(), value.dtype, value.device, value.is_inference()))
        elif is_constant(value):
            leaves.append(value)
        else:
            leaves.append(None)
            unknown.append(f"{type(value).__module__}.{type(value).__qualname__}")
    return tuple(leaves), tuple(unknown)
