"""Graphs for tests, as passes see them: traced from plain functions, or captured from Dynamo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from hero_fx import backends
from hero_fx.build import normalized
from hero_fx.passes.compat import lazy_code, new_fake_mode, to_fake
from hero_fx.passes.pipeline import Pass, PassRecord, Pipeline


def trace(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The pre-dispatch ATen graph of a function of tensors, with fake values; in-place ops are still in it."""
    mode = new_fake_mode()
    with mode, torch.no_grad():
        return make_fx(function, pre_dispatch=True)(*[to_fake(mode, value) for value in inputs])


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The one Dynamo graph of a call, and its example inputs."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*args, **kwargs)
    (graph,) = graphs
    return graph


@dataclass(frozen=True)
class Shared:
    """A Dynamo graph for many backends. It is normalised once: backends copy the normalised graph and leave it as it is."""

    gm: fx.GraphModule
    inputs: list[Any]

    @cached_property
    def normal(self) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
        with torch.no_grad():
            return normalized(self.gm, self.inputs)

    def compiled(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        """What a backend makes of the graph."""

        def once(gm: Any, inputs: Any, disabled: Sequence[str] = ()) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
            return normalized(gm, inputs, disabled) if disabled else self.normal

        # As in Dynamo, code is written when it runs, and not once more after each rewrite.
        with torch.no_grad(), lazy_code(), patch.object(backends, "normalized", once):
            run: Callable[..., Any] = backend(self.gm, self.inputs)
        return run


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
