"""Tensor subclasses among a graph's inputs: quantised weights are replaced by the plain tensors they are made of.

A quantised weight (torchao's, for example) is one input to Dynamo, but holds several tensors and runs several ops where
the graph has one. The passes need to see all of these. So each such input is replaced by its parts and a call that puts
them together again; tracing then records the ops that the weight runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hero_fx.passes.compat import copy_origin, copy_source, is_traceable_wrapper_subclass

__all__ = ["Unwrapped", "parts_of", "unwrap"]


def parts_of(value: Any) -> list[torch.Tensor]:
    """The plain tensors that a tensor is made of; itself, if it is one."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(value, name))]


class _Rebuild(torch.nn.Module):
    """Makes a tensor like `example` of its parts."""

    def __init__(self, example: Any) -> None:
        super().__init__()
        names, self.context = example.__tensor_flatten__()
        inner = [(name, getattr(example, name)) for name in names]
        self.kind: Any = type(example)
        self.size, self.stride = example.size(), example.stride()
        self.counts = [(name, len(parts_of(value))) for name, value in inner]
        self.nested = torch.nn.ModuleDict(
            {name: _Rebuild(value) for name, value in inner if is_traceable_wrapper_subclass(value)}
        )

    def forward(self, *parts: torch.Tensor) -> Any:
        inner, taken = {}, 0
        for name, count in self.counts:
            own, taken = parts[taken : taken + count], taken + count
            inner[name] = self.nested[name](*own) if name in self.nested else own[0]
        return self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A graph whose inputs are plain tensors and numbers."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    """Its example inputs."""
    kinds: tuple[str, ...] = ()
    """Names of the classes of the inputs that had to be taken apart."""

    def call(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, which takes plain inputs, as a function of the inputs that Dynamo has."""
        if not self.kinds:
            return run
        return lambda *inputs: run(*(part for value in inputs for part in parts_of(value)))


def unwrap(gm: fx.GraphModule, inputs: Sequence[Any]) -> Unwrapped:
    """Replaces tensor subclasses among the inputs of a Dynamo graph by the plain tensors they are made of.

    Before::

        linear = torch.nn.functional.linear(x, weight, None)  # weight: int8 values and scales in one

    After::

        rebuild = rebuild_0(weight_qdata, weight_scale)
        linear = torch.nn.functional.linear(x, rebuild, None)

    The graph itself is returned where there is none.
    """
    kinds = sorted({type(value).__name__ for value in inputs if is_traceable_wrapper_subclass(value)})
    if not kinds:
        return Unwrapped(gm, tuple(inputs))
    graph = fx.Graph()
    root = torch.nn.Module()
    values = iter(inputs)
    env: dict[fx.Node, fx.Node] = {}
    plain: list[Any] = []
    rebuilds: list[tuple[fx.Node, str, list[fx.Node]]] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = next(values)
        parts = parts_of(value)
        plain += parts
        if not is_traceable_wrapper_subclass(value):
            env[node] = graph.node_copy(node)
            copy_source(node, env[node])
            continue
        made = [graph.placeholder(f"{node.name}_{number}") for number in range(len(parts))]
        for part_node, part in zip(made, parts, strict=True):
            # All but the value is the weight's: its name, and that it is a parameter.
            part_node.meta = {**node.meta, "example_value": part}
            copy_source(None, part_node)
        root.add_module(f"rebuild_{len(rebuilds)}", _Rebuild(value))
        rebuilds.append((node, f"rebuild_{len(rebuilds)}", made))
    for node, name, made in rebuilds:
        env[node] = graph.call_module(name, tuple(made))
    for name, module in gm.named_children():
        root.add_module(name, module)
    for name, tensor in (*gm.named_parameters(recurse=False), *gm.named_buffers(recurse=False)):
        root.register_buffer(name, tensor)
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
    result = fx.GraphModule(root, graph)
    result.meta = dict(gm.meta)
    copy_origin(gm, result)
    return Unwrapped(result, tuple(plain), tuple(kinds))
