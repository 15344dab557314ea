"""Compiled code of a verification's own.

Nothing here touches the model, its compiled code or its feature state: calls run through a function whose code object is
made anew each time, and Dynamo keeps what it compiled with that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

from hero_fx import dynamo
from hero_fx.backends import Backend
from hero_fx.config import Config
from hero_fx.passes import compat
from hero_fx.source import Source

__all__ = ["Call", "Compiled"]

Model = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def _call_model(self: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return self(*args, **kwargs)


class _CompiledOnly(Exception):
    """Stops a compiled model before it runs."""


class _Variants:
    """A backend that makes of each graph of Dynamo what several backends make of it, and runs one of these."""

    def __init__(self, choose: Callable[[Source], Mapping[str, Config]]) -> None:
        self._choose = choose
        self.backends: dict[str, Backend] = {}
        self.now = ""

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Model:
        source = Source(gm, inputs)
        if not self.backends:
            configs = self._choose(source)
            del self._choose  # what it holds may hold this
            # Plain compilation hands Dynamo's own graph to the inner compiler, which may change it.
            plain_last = sorted(configs, key=lambda name: configs[name].policy == "full")
            self.backends = {name: Backend(configs[name]) for name in plain_last}
        runs = {name: _compiled(backend, source) for name, backend in self.backends.items()}
        return lambda *tensors: (runs[self.now] if self.now else _stop)(*tensors)


def _stop(*tensors: Any) -> Any:
    raise _CompiledOnly


def _compiled(backend: Backend, source: Source) -> Model:
    """What a backend makes of a graph. What it raises is raised by its calls: the others may do."""
    try:
        return backend.compile(source, backend.config)
    except Exception as error:
        if dynamo.is_control_flow(error):
            raise
        raised = error

    def call(*tensors: Any) -> Any:
        raise raised

    return call


class Compiled:
    """Calls of a model through backends of their own, as `torch.compile(model, backend=...)` makes them.

    Dynamo traces the model once for all of them.
    """

    def __init__(self, model: Model, call: Call, choose: Callable[[Source], Mapping[str, Config]]) -> None:
        """Compiles a call, and does not run it; `choose`: the options of each backend by name, for what Dynamo traced.

        Raises:
            ValueError: `choose` raised it, or the call runs no graph.
        """
        self._variants = _Variants(choose)
        fresh = FunctionType(_call_model.__code__.replace(), globals(), "call_model")
        self._run = torch.compile(fresh, backend=self._variants, dynamic=False)
        try:
            with torch.no_grad(), compat.autocast_kept(), dynamo.unlimited_tracing():
                self._run(model, call.args, call.kwargs)
        except _CompiledOnly:
            return
        except Exception as error:
            cause = getattr(error, "inner_exception", error)
            if isinstance(cause, ValueError):
                raise cause from None
            raise
        raise ValueError("the call ran no graph: was the model compiled away, or is torch.compile disabled?")

    def __contains__(self, name: str) -> bool:
        return name in self._variants.backends

    def backend(self, name: str) -> Backend:
        """The backend of that name."""
        return self._variants.backends[name]

    def __call__(self, name: str, model: Model, call: Call) -> list[Tensor]:
        """The tensors that the model returns, or one of its class, by that backend."""
        self._variants.now = name
        with torch.no_grad(), compat.autocast_kept():
            outputs = self._run(model, call.args, call.kwargs)
        tensors = compat.tensors_in(outputs) or compat.tensors_in(getattr(outputs, "__dict__", ()))
        if not tensors:
            raise ValueError(
                f"the model returned {type(outputs).__name__} without a tensor: there is nothing to compare"
            )
        return tensors
