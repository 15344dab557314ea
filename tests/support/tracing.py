"""Graphs for tests, as passes see them: traced from plain functions, or captured from Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.proxy_tensor import make_fx

from hero_fx import Backend
from hero_fx.build import normalized
from hero_fx.dynamo import is_control_flow
from hero_fx.passes.compat import lazy_code, new_fake_mode, to_fake
from hero_fx.passes.pipeline import Pass, PassRecord, Pipeline
from hero_fx.source import Source


def trace(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The pre-dispatch ATen graph of a function of tensors, with fake values; in-place ops are still in it."""
    mode = new_fake_mode()
    with mode, torch.no_grad():
        return make_fx(function, pre_dispatch=True)(*[to_fake(mode, value) for value in inputs])


class _Kept(Exception):
    """There is a graph, and nothing else is wanted."""


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The one Dynamo graph of a call, and its example inputs."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((gm, list(inputs)))
        raise _Kept

    torch._dynamo.reset()
    with torch.no_grad(), suppress(BackendCompilerFailed):  # Dynamo need not make guards, nor run the model
        torch.compile(model, backend=keep, fullgraph=True)(*args, **kwargs)
    (graph,) = graphs
    return graph


@dataclass(frozen=True)
class Shared:
    """A Dynamo graph for many backends, normalised once."""

    gm: fx.GraphModule
    inputs: list[Any]

    @cached_property
    def source(self) -> Source:
        return Source(self.gm, self.inputs)

    def compiled(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        """What a backend makes of the graph."""
        with (
            torch.no_grad(),
            lazy_code(),
        ):  # as in Dynamo, code is written when it runs, and not once more after each rewrite
            if isinstance(backend, Backend):
                return backend.compile(self.source, backend.config)
            run: Callable[..., Any] = backend(self.gm, self.inputs)
            return run


class Variants:
    """A backend that makes of each graph of Dynamo what several backends make of it, and runs the one named by `now`.

    "plain" is the graph as it is. What a backend raises is raised by its calls.
    """

    def __init__(self, **backends: Backend) -> None:
        self.backends, self.now = backends, "plain"

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        source = Source(gm, inputs)
        runs: dict[str, Callable[..., Any]] = {"plain": gm.forward}
        runs |= {name: _or_raise(backend, source) for name, backend in self.backends.items()}
        return lambda *values: runs[self.now](*values)


def _or_raise(backend: Backend, source: Source) -> Callable[..., Any]:
    try:
        return backend.compile(source, backend.config)
    except Exception as error:
        if is_control_flow(error):
            raise
        raised = error

    def call(*values: Any) -> Any:
        raise raised

    return call


class Traced:
    """A model that Dynamo traces once, for many backends: calls go through its code, which rebuilds what the model returns."""

    def __init__(self, model: Callable[..., Any], *example: Any) -> None:
        self._graphs: list[Shared] = []
        self._run: Callable[..., Any] | None = None
        self._call: Callable[..., Any] = torch.compile(model, backend=self._keep, fullgraph=True)
        with torch.no_grad():
            self._call(*example)

    def _keep(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        assert not self._graphs, "it was to be traced once"
        self._graphs.append(Shared(gm, list(inputs)))
        return lambda *values: (self._run or gm.forward)(*values)

    def by(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        """What `torch.compile(model, backend=backend)` would call."""
        run = self._graphs[0].compiled(backend)

        def call(*inputs: Any) -> Any:
            self._run = run
            return self._call(*inputs)

        return call


def normal_form(model: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The normalised graph of a call of a model."""
    return normalized(*capture(model, *args, **kwargs))[0]


def run_passes(gm: fx.GraphModule, *passes: Pass) -> list[PassRecord]:
    """Runs passes on a graph as the backend does; one record per pass."""
    return list(Pipeline(label="test", passes=passes)(gm))


def outputs(value: Any) -> list[Tensor]:
    """What a graph or a function returns, as a list."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


def equal(ours: Any, theirs: Any) -> bool:
    """The same tensors, bit for bit and of the same dtypes."""
    a, b = outputs(ours), outputs(theirs)
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))
