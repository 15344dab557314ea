"""Regions of vmap within a model, written out as plain ops before the graph is traced.

`flex_attention` makes its block mask with vmap. Dynamo leaves the calls that open and close it in the graph. Pre-dispatch
tracing would take the tensors that are made between them, each of which hides a batch, for constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from hero_fx.passes.compat import map_nesting
from hero_fx.passes.ops import nodes_in

from .constants import WriteLiterals

__all__ = ["without_maps"]


def without_maps(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph with each outermost map replaced by the plain operators it comes to; `gm` itself if it has none.

    Before::

        _vmap_increment_nesting = _vmap_increment_nesting(3, "error")
        row = _add_batch_dim(x, 0, 1)  # x: [3, 4]
        zeros = row.new_zeros(5)
        out = _remove_batch_dim(zeros, 1, 3, 0)  # [3, 5]
        _vmap_decrement_nesting = _vmap_decrement_nesting()

    After::

        zeros = aten.new_zeros.default(x, [3, 5])

    Legal because it is what the map does when it runs: the operators are recorded behind it, with the batch as an axis.

    Args:
        gm: a graph of Dynamo's.
        inputs: its fake inputs; the fake mode is on.
    """
    regions = _regions(gm.graph)
    if not regions:
        return gm
    values = _Values(gm, {source for region in regions for source in _outside(region)})
    values.run(*inputs)
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    heads = {region[0]: region for region in regions}
    mapped = {node for region in regions for node in region}
    for node in gm.graph.nodes:
        if node in heads:
            env |= _written_out(gm, graph, heads[node], env, values.kept)
        elif node not in mapped and map_nesting(node.target) is None:
            env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(gm, graph)


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """What lies between the opening and the closing of each outermost map, both included."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        step = map_nesting(node.target) or 0
        if depth == 0 and step == 1:
            regions.append([])
        if depth or step == 1:
            regions[-1].append(node)
        depth += step
    return regions


def _outside(region: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes in front of a region that it reads."""
    inside = set(region)
    return list(dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside))


class _Values(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = value
        return value


def _written_out(
    gm: fx.GraphModule,
    graph: fx.Graph,
    region: Sequence[fx.Node],
    env: dict[fx.Node, fx.Node],
    values: dict[fx.Node, Any],
) -> dict[fx.Node, fx.Node]:
    """Appends to `graph` what a region comes to; returns the new nodes of what is read behind it."""
    inside, sources = set(region), _outside(region)
    results = [node for node in region if any(user not in inside for user in node.users)]
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for source in sources:
        copies[source] = part.placeholder(source.name)
    for node in region:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in results])
    with torch.no_grad():
        traced = make_fx(fx.Interpreter(fx.GraphModule(gm, part)).run)(*(values[source] for source in sources))
    traced.graph.eliminate_dead_code()
    WriteLiterals().apply(traced)
    new = dict(zip(traced.graph.find_nodes(op="placeholder"), (env[source] for source in sources), strict=True))
    for node in traced.graph.nodes:
        assert node.op != "get_attr", "the constants of a map are literals"
        if node.op == "call_function":
            new[node] = graph.node_copy(node, new.__getitem__)
    outputs = nodes_in(traced.graph.output_node().args)
    return {node: new[out] for node, out in zip(results, outputs, strict=True)}
