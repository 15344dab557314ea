"""The step graphs of a model's call, without compiling or running anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from . import dynamo
from .backends import Backend
from .backends import backend as make_backend
from .step_graphs import StepGraphs

__all__ = ["look_at_graph", "trace"]

T = TypeVar("T")


class _TracedOnly(Exception):
    """Stops a traced model before it runs."""


def trace(model: Callable[..., Any], *args: Any, backend: Backend | None = None, **kwargs: Any) -> StepGraphs:
    """The step graphs that `backend` would compile for a call of `model`, without compiling or running anything.

    Args:
        model: a module, or what `torch.compile` made of one. On the meta device it needs no memory.
        backend: options to rewrite with; None: the backend the model was compiled with, or the defaults.
        args, kwargs: of the call, as the denoising loop makes it.

    Raises:
        ValueError: the model cannot be accelerated; the message says why.
    """
    backend = backend or dynamo.backend_of(model, Backend) or make_backend()
    assert isinstance(backend, Backend)
    return look_at_graph(dynamo.uncompiled(model), args, kwargs, backend.trace)


def look_at_graph(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    look: Callable[[fx.GraphModule, Sequence[Any]], T],
) -> T:
    """What `look` says of the Dynamo graph of a call and its example inputs; nothing is compiled or run."""
    seen: list[T] = []

    def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> dynamo.Compiled:
        seen.append(look(gm, inputs))
        raise _TracedOnly  # here, not at the call: so Dynamo keeps no code, and its recompile limit stays whole

    compiled = torch.compile(model, backend=capture)
    try:
        with torch.no_grad(), dynamo.unlimited_tracing():
            compiled(*args, **kwargs)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        if isinstance(cause, _TracedOnly):
            return seen[0]
        if isinstance(cause, ValueError):
            raise cause from None
        raise
    raise ValueError("the call ran no graph: was the model compiled away, or is torch.compile disabled?")
