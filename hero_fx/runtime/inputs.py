"""What the inputs of a compiled graph are, by position."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from hero_fx.find_timestep import is_table
from hero_fx.passes.analysis.exchange import collectives
from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.emit import value_of
from hero_fx.step_graphs import StepGraphs

from .evidence import Roles, find_roles

__all__ = ["Inputs", "graph_inputs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the inputs of a graph are, by position."""

    timestep: int
    weights: tuple[int, ...] = ()
    """Parameters and buffers, which Dynamo makes inputs."""
    values: tuple[int, ...] = ()
    """Tensors that the caller passes, without the timestep and those that the model writes."""
    roles: Roles = field(default_factory=Roles)
    """Of `values`."""
    batch: frozenset[int] = frozenset()
    """Sizes that the batch may have."""
    shapes: tuple[tuple[str, torch.Size], ...] = ()
    """Name and shape of what the caller passes."""
    shared: bool = False
    """Several processes run the graph together, and must all take a call for the same step."""


def graph_inputs(steps: StepGraphs, timestep: int) -> Inputs:
    """What the inputs of a normalised graph are."""
    nodes = [(i, node) for i, node in enumerate(steps.normal.graph.find_nodes(op="placeholder"))]
    tensors = [(i, node) for i, node in nodes if isinstance(value_of(node), torch.Tensor)]
    weights = tuple(i for i, node in tensors if not node.meta.get("model_input", True))
    memory = Memory(steps.normal.graph)
    # What the model itself writes, such as a KV cache, is another value at each call: it tells nothing.
    values = [(i, node) for i, node in tensors if i not in weights and i != timestep and not memory.written(node)]
    outputs = [value_of(node).shape for node in steps.normal.graph.output_node().all_input_nodes if _is_tensor(node)]
    by_name = {node.name: node for node in steps.normal.graph.nodes}
    roots = [by_name[s.root] for s in steps.structure.streams if s.tokens.dim > 0 and not s.tokens.folded]
    sizes = [shape[0] for shape in outputs if len(shape)] + [value_of(root).shape[0] for root in roots]
    batch = frozenset(size for size in sizes if isinstance(size, int))
    if is_table(steps.normal, nodes[timestep][1]):
        batch = frozenset()  # tokens look their times up in it: its elements are not the batch's
    return Inputs(
        timestep=timestep,
        weights=weights,
        values=tuple(i for i, _ in values),
        roles=find_roles([value_of(node).shape for _, node in values], outputs, max(batch, default=1)),
        batch=batch,
        shapes=tuple((node.meta["argument"], value_of(node).shape) for i, node in tensors if i not in weights),
        shared=bool(collectives(steps.normal)),
    )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)
