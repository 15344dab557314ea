"""Graphs that show their features: for analysis, not for speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from hero_fx.passes.analysis.structure import Structure, Update
from hero_fx.passes.emit import Emitter

__all__ = ["Features", "ReturnFeatures"]

aten = torch.ops.aten

Features = Literal["update", "hidden"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReturnFeatures:
    """Returns, behind the graph's own outputs, the features of every layer's image tokens.

    Before::

        add = aten.add.Tensor(x, mul)
        add_1 = aten.add.Tensor(add, mul_1)
        return (add_1,)

    After, with `features="update"` (what a layer adds to the residual stream)::

        add = aten.add.Tensor(x, mul)
        add_1 = aten.add.Tensor(add, mul_1)
        add_2 = aten.add.Tensor(mul, mul_1)
        return (add_1, add_2)

    With `"hidden"` (the stream behind the layer) it is `return (add_1, add_1)`. Legal because it only adds readers of
    existing values.
    """

    structure: Structure
    features: Features
    name: str = "return_features"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        nodes = {node.name: node for node in gm.graph.nodes}
        found = []
        with emitter.before(emitter.output):
            for layer in range(self.structure.depth):
                branches = [branch for branch in self.structure.branches if branch.layer == layer]
                updates = [u for branch in branches for u in branch.updates if self._image_ranges(u)]
                if not updates:
                    continue
                if self.features == "hidden":
                    found.append(self._image(emitter, updates[-1], nodes[updates[-1].add]))
                    continue
                total, *others = (self._image(emitter, u, nodes[u.update]) for u in updates)
                for part in others:
                    total = emitter.call(aten.add.Tensor, total, part)
                found.append(total)
        own = emitter.output.args[0]
        assert isinstance(own, (tuple, list)), "Dynamo's graphs return a tuple"
        emitter.output.args = ((*own, *found),)
        return len(found)

    def _image_ranges(self, update: Update) -> list[tuple[int, int]]:
        """Where the image tokens lie among those of the stream."""
        spans = self.structure.streams[update.stream].tokens.spans()
        return [(start, stop) for segment, start, stop in spans if segment.source.is_image]

    def _image(self, emitter: Emitter, update: Update, node: fx.Node) -> fx.Node:
        """The image tokens of a value of the stream."""
        dim, ranges = self.structure.streams[update.stream].tokens.dim, self._image_ranges(update)
        if sum(stop - start for start, stop in ranges) == self.structure.streams[update.stream].tokens.length:
            return node
        parts = [emitter.call(aten.slice.Tensor, node, dim, start, stop) for start, stop in ranges]
        return parts[0] if len(parts) == 1 else emitter.call(aten.cat.default, parts, dim)
