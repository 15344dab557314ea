"""Calls of a model as plain data: two calls with equal specifications run the same graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hero_fx.passes import compat
from hero_fx.passes.compat import short_name

__all__ = [
    "Call",
    "CallSpec",
    "Conditions",
    "Constant",
    "SameAs",
    "TensorSpec",
    "bind",
    "current_conditions",
    "is_constant",
]

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


def is_constant(value: object) -> bool:
    """Whether an argument is one that a graph bakes in and a file can hold."""
    return type(value) in _CONSTANTS


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor. Its strides are not in it: packages take contiguous arguments."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> TensorSpec:
        """That of a tensor."""
        return cls(tuple(value.shape), value.dtype, value.device)

    def __str__(self) -> str:
        on = "" if self.device.type == "cpu" else f" on {self.device}"
        return f"{short_name(self.dtype)}{list(self.shape)}{on}"


@dataclass(frozen=True, slots=True)
class SameAs:
    """The very tensor that an earlier leaf is."""

    index: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that the graph has baked in. Its type counts too: to Python, `True` is 1."""

    type: str
    value: Any

    @classmethod
    def of(cls, value: object) -> Constant:
        """That of an argument; of one that no file holds, something that no file has."""
        return cls(type(value).__name__, value if is_constant(value) else f"an object {id(value)}")

    def __str__(self) -> str:
        return repr(self.value)


Leaf = TensorSpec | SameAs | Constant


@dataclass(frozen=True, slots=True)
class CallSpec:
    """The arguments of a call by name, defaults included, flattened."""

    names: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    structure: str
    """As JSON."""

    def __str__(self) -> str:
        parts = []
        for name, leaf in zip(self.names, self.leaves, strict=True):
            match leaf:
                case TensorSpec():
                    parts.append(f"{name} {leaf}")
                case SameAs(index):
                    parts.append(f"{name} is {self.names[index]}")
                case Constant():
                    parts.append(f"{name}={leaf}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Call:
    """A call at hand."""

    values: list[Any]
    """Its flattened arguments."""
    leaves: tuple[Leaf, ...]
    structure: Any

    def __str__(self) -> str:
        return str(CallSpec(self._names(), self.leaves, ""))

    def spec(self) -> CallSpec:
        """Its specification. Raises NotImplementedError for containers that cannot be written as JSON."""
        return CallSpec(self._names(), self.leaves, compat.treespec_dumps(self.structure))

    def _names(self) -> tuple[str, ...]:
        return compat.leaf_names(compat.tree_unflatten(self.values, self.structure))


def bind(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The arguments of a call, by name and in one order, however they were passed.

    Raises:
        TypeError: a function of this signature takes no such arguments.
    """
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments[name] = dict(sorted(arguments[name].items()))
    values, structure = compat.tree_flatten(arguments)
    first: dict[int, int] = {}
    leaves: list[Leaf] = []
    for index, value in enumerate(values):
        if type(value) is not Tensor:
            leaves.append(Constant.of(value))
        elif id(value) in first:
            leaves.append(SameAs(first[id(value)]))
        else:
            first[id(value)] = index
            leaves.append(TensorSpec.of(value))
    return Call(values, tuple(leaves), structure)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What beside the arguments decides what a graph computes."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    default_dtype: torch.dtype
    default_device: torch.device

    def __str__(self) -> str:
        autocast = ", ".join(f"autocast to {short_name(to)} on {on}" for on, to in self.autocast)
        dtype, device = short_name(self.default_dtype), self.default_device
        return f"{autocast or 'no autocast'}, default dtype {dtype}, default device {device}"


def current_conditions() -> Conditions:
    """Those of now."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    autocast = [(device, dtype) for device in devices if (dtype := compat.autocast_dtype(device)) is not None]
    return Conditions(tuple(autocast), torch.get_default_dtype(), torch.get_default_device())
