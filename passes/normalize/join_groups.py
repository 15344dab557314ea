"""Arithmetic on tokens in groups, such as a scale for each frame: done on the token axis as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.analysis.tokens import sizes_of
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.ops import POINTWISE, RESHAPES, first_input

__all__ = ["JoinGroups"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinGroups:
    """Scales and shifts [batch, tokens, channels], where a graph splits the tokens into groups for it and joins them again.

    Before (a scale for each of 3 frames)::

        reshape = aten.reshape.default(norm, [2, 3, 24, 32])  # norm: [2, 72, 32]
        mul = aten.mul.Tensor(reshape, scale)  # scale: [2, 3, 1, 32]
        reshape_1 = aten.reshape.default(mul, [2, 72, 32])

    After::

        expand = aten.expand.default(scale, [2, 3, 24, 32])
        reshape = aten.reshape.default(expand, [2, 72, 32])
        mul = aten.mul.Tensor(norm, reshape)

    Legal because pointwise ops give the same values whatever the shape, as long as all operands are reshaped in the same
    way, and a small operand is first repeated as broadcasting would. It fires only where all that is computed from the
    groups is joined again (heads that are split off for attention stay), nothing writes to the memory of what it reads, and
    the split tensor is not returned. The token axis can then be followed, and what was one value per group is a table with
    a value for each token, of which a subset takes its rows.
    """

    name: str = "join_groups"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, sites, gone = Emitter(gm), 0, set[fx.Node]()
        memory: Memory | None = None  # made where it is asked for
        for node in list(gm.graph.nodes):
            axis = None if node in gone else _split_axis(node)
            region = [] if axis is None else _region(node)
            if axis is None or not region:
                continue
            memory = memory or Memory(gm.graph)
            if _still(memory, node, region):
                _join(emitter, node, region, axis)
                gone.update(region)
                memory, sites = None, sites + 1
        return sites


def _still(memory: Memory, split: fx.Node, region: list[fx.Node]) -> bool:
    """Whether what a region reads can be read at any time, and its results can lie in other memory."""
    read = {split, *(n for node in region for n in (node, *node.all_input_nodes))}
    return not any(map(memory.written, read)) and not memory.returned(split)


def _split_axis(node: fx.Node) -> int | None:
    """The axis that a reshape splits in two, if it does that and no more, and it is not that of channels."""
    if node.target not in RESHAPES:
        return None
    before, after = sizes_of(node.args[0]), sizes_of(node)
    for axis in range(len(before) - 1):
        match after[axis : axis + 2]:
            case (int(a), int(b)) if 1 not in (a, b) and before == (*after[:axis], a * b, *after[axis + 2 :]):
                return axis
    return None


def _region(split: fx.Node) -> list[fx.Node]:
    """What is computed from the groups up to the reshapes that join them, in order; nothing if some of it is not joined."""
    whole, shape = sizes_of(split.args[0]), sizes_of(split)
    region: dict[fx.Node, None] = {}
    todo, arithmetic = [split], False
    while todo:
        for user in todo.pop().users:
            if user in region:
                continue
            region[user] = None
            if user.target in POINTWISE and sizes_of(user) == shape:
                arithmetic = True
                todo.append(user)
            elif user.target not in RESHAPES or sizes_of(user) != whole:
                return []
    return sorted(region) if arithmetic else []


def _join(emitter: Emitter, split: fx.Node, region: list[fx.Node], axis: int) -> None:
    """Computes a region without the split; the readers of its joins read what was joined."""
    joined = {split: first_input(split)}

    def operand(node: fx.Node) -> fx.Node:
        return joined[node] if node in joined else _joined(emitter, node, split, axis)

    for node in region:
        if node.target in RESHAPES:
            node.replace_all_uses_with(joined[first_input(node)])
            continue
        with emitter.before(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
            joined[node] = emitter.call(node.target, *args, **kwargs)
    for node in (*reversed(region), split):
        emitter.graph.erase_node(node)


def _joined(emitter: Emitter, node: fx.Node, split: fx.Node, axis: int) -> fx.Node:
    """An operand from outside, in the shape that meets the whole axis."""
    groups, shape = value_of(split).shape, list(value_of(node).shape)
    at = axis - len(groups) + len(shape)  # where the groups would be
    if at < -1:
        return node
    if _split_axis(node) == axis == at and sizes_of(node) == sizes_of(split):
        return first_input(node)
    pair = shape[max(at, 0) : at + 2]
    if any(size != 1 for size in sizes_of(node)[max(at, 0) : at + 2]):
        node = emitter.call(
            aten.expand.default, node, [*shape[: max(at, 0)], *groups[axis : axis + 2], *shape[at + 2 :]]
        )
        pair = list(groups[axis : axis + 2])
    size = pair[0] * pair[-1] if len(pair) == 2 else pair[0]
    return emitter.call(aten.reshape.default, node, [*shape[: max(at, 0)], size, *shape[at + 2 :]])
