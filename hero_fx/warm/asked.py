"""Where the inputs of a compiled graph come from and what becomes of its outputs: asked of the compiled model itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hero_fx.passes import compat
from hero_fx.passes.emit import value_of
from hero_fx.passes.normalize.subclasses import parts_of
from hero_fx.passes.rewrite.forecast import outputs_of
from hero_fx.runtime.stepper import Stepper

from .archive import Argument, Literal, Output, Stored, Weight
from .called import Called
from .probe import Probe, probing
from .signature import CallSpec, bind, is_constant

__all__ = ["Asked", "CannotSave", "ask", "weights_of"]


class CannotSave(ValueError):
    """Why a graph, or a model, cannot be saved."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The answer."""

    call: CallSpec
    sources: tuple[Argument | Weight | Stored | Literal, ...]
    returns: str
    leaves: tuple[Output | Argument | Literal, ...]
    inputs: tuple[Any, ...]
    """What the graph takes; of the call's arguments examples."""
    tensors: Mapping[str, Tensor]
    """Those that are `Stored`."""


def ask(compiled: Any, model: nn.Module, stepper: Stepper, called: Called, prefix: str) -> Asked:
    """Calls a compiled model with arguments like those that a graph was compiled for, and computes nothing.

    `prefix`: of the names of stored tensors.

    Raises:
        CannotSave: the call takes or returns what no file can hold, or the graph is no longer the one for it.
    """
    if called.unknown:
        raise CannotSave(
            f"a call passes {', '.join(called.unknown)}: pass tensors, numbers, strings, or containers of them"
        )
    assert stepper.graphs is not None
    reached: list[tuple[Any, ...]] = []
    returned = [_example(node) for node in outputs_of(stepper.graphs.normal)]

    def probe(other: Stepper, inputs: Sequence[Any]) -> Any:
        if other is not stepper:
            raise CannotSave("another graph, compiled later, runs in its place")
        reached.append(tuple(inputs))
        return tuple(returned)

    args, kwargs = called.example()
    result = _result(compiled, called, args, kwargs, probe)
    if not reached:
        raise CannotSave("the compiled model runs without it")
    call = bind(inspect.signature(model.forward), args, kwargs)
    try:
        spec = call.spec()
        leaves, structure = compat.tree_flatten(result)
        returns = compat.treespec_dumps(structure)
    except (NotImplementedError, KeyError) as error:
        raise CannotSave(f"a call takes or returns a container that cannot be written: {error}") from error
    tensors: dict[str, Tensor] = {}
    sources = _sources(reached[0], call.values, model, prefix, tensors)
    return Asked(spec, sources, returns, _leaves(leaves, returned, call.values), reached[0], tensors)


def _result(compiled: Any, called: Called, args: Any, kwargs: Any, probe: Probe) -> Any:
    """What the compiled model returns, with or without inference mode: Dynamo guards it, and hides it while it compiles."""
    failed: Exception | None = None
    for inference in (False, True):
        try:
            with called.context(inference), torch.compiler.set_stance("fail_on_recompile"), probing(probe):
                return compiled(*args, **kwargs)
        except RuntimeError as error:
            failed = failed or error
    raise CannotSave(
        f"Dynamo would compile the model anew, for its code looks at something that has changed: {failed}"
    ) from failed


def weights_of(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """The parameters and buffers of a model by name, each as the plain tensors that it is made of."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(parts_of(tensor)) for name, tensor in named}


def _example(node: object) -> Tensor:
    value = value_of(node) if isinstance(node, fx.Node) else node
    if not isinstance(value, Tensor):
        raise CannotSave(f"its graph returns {value!r} beside tensors")
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _sources(
    inputs: Sequence[Any], values: Sequence[Any], model: nn.Module, prefix: str, tensors: dict[str, Tensor]
) -> tuple[Argument | Weight | Stored | Literal, ...]:
    arguments = {id(value): index for index, value in reversed([*enumerate(values)])}
    weights = {
        id(part): (name, number) for name, parts in weights_of(model).items() for number, part in enumerate(parts)
    }
    found: list[Argument | Weight | Stored | Literal] = []
    for position, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            if not is_constant(value):
                raise CannotSave(f"input {position} of its graph is a {type(value).__name__}")
            found.append(Literal(value))
        elif id(value) in arguments:
            found.append(Argument(arguments[id(value)]))
        elif id(value) in weights:
            name, part = weights[id(value)]
            shape, stride = tuple(value.shape), value.stride()
            found.append(Weight(name, part, shape, stride, value.dtype, value.device))
        else:
            tensors[f"{prefix}{position}"] = value
            found.append(Stored(f"{prefix}{position}"))
    return tuple(found)


def _leaves(
    leaves: Sequence[Any], returned: Sequence[Tensor], values: Sequence[Any]
) -> tuple[Output | Argument | Literal, ...]:
    outputs = {id(value): index for index, value in enumerate(returned)}
    arguments = {id(value): index for index, value in enumerate(values) if isinstance(value, Tensor)}
    found: list[Output | Argument | Literal] = []
    for leaf in leaves:
        if id(leaf) in outputs:
            found.append(Output(outputs[id(leaf)]))
        elif id(leaf) in arguments:
            found.append(Argument(arguments[id(leaf)]))
        elif is_constant(leaf):
            found.append(Literal(leaf))
        else:
            raise CannotSave(
                f"the model returns a {type(leaf).__module__}.{type(leaf).__qualname__}: have it return tensors, or "
                "containers of them (return_dict=False with many models)"
            )
    return tuple(found)
