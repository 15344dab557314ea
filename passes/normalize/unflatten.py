"""Products of flattened tokens: keeping the token axis an axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.analysis.tokens import sizes_of
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.ops import POINTWISE, RESHAPES

__all__ = ["UnflattenProducts"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class UnflattenProducts:
    """Multiplies [batch, tokens, channels] by a matrix, where a graph flattens it to [batch * tokens, channels] first.

    Before (a linear layer with int8 weights and a scale for each output)::

        reshape = aten.reshape.default(x, [-1, 32])  # x: [2, 79, 32]
        mm = aten.mm.default(reshape, weight)
        mul = aten.mul.Tensor(mm, scale)
        reshape_1 = aten.reshape.default(mul, [2, 79, 64])

    After::

        matmul = aten.matmul.default(x, weight)
        mul = aten.mul.Tensor(matmul, scale)

    Legal because a product with a matrix acts on each row by itself, and so does arithmetic with numbers and with
    tensors that have a channel axis alone; only the shape of what lies between both reshapes changes. A reader of the
    flat result that is none of these gets it flat. Nothing writes to the memory of what is flattened, nor to that of the
    result. The token axis can then be followed, and a subset of tokens taken.
    In a graph with such products, a reshape that undoes the one before goes too: functionalising an in-place addition of
    the bias leaves a pair of them.
    """

    name: str = "unflatten_products"

    def apply(self, gm: fx.GraphModule) -> int:
        products = [n for n in gm.graph.nodes if n.target is aten.mm.default and _is_flat(n.args[0])]
        if not products:
            return 0
        memory, emitter = Memory(gm.graph), Emitter(gm)
        found = [node for node in products if not memory.written(node.args[0]) and not memory.written(node)]
        for node in found:
            flat, matrix = node.args
            with emitter.before(node):
                product = emitter.call(aten.matmul.default, flat.args[0], matrix)
            _move(emitter, node, product)
        return len(found) + (_drop_round_trips(gm.graph) if found else 0)


def _is_flat(node: object) -> bool:
    """True for [a, b, .., c] reshaped to [a * b * .., c]."""
    if not isinstance(node, fx.Node) or node.target not in RESHAPES:
        return False
    (source,) = node.all_input_nodes
    before, after = sizes_of(source), sizes_of(node)
    return len(before) > len(after) == 2 and before[-1] == after[-1]


def _move(emitter: Emitter, flat: fx.Node, kept: fx.Node) -> None:
    """The readers of `flat` [a * b, c] read `kept` [a, b, c]; `flat` is erased, or stays as a view of `kept`."""
    for user in list(flat.users):
        if user.target in RESHAPES and sizes_of(user) == sizes_of(kept):
            user.replace_all_uses_with(kept)
            emitter.graph.erase_node(user)
        elif user.target in POINTWISE and _by_channel(user, flat):
            args = tuple(kept if arg is flat else arg for arg in user.args)
            with emitter.before(user):
                moved = emitter.call(user.target, *args, **user.kwargs)
            _move(emitter, user, moved)
    if flat.users:
        shape = list(value_of(flat).shape)
        with emitter.after(kept):
            flat.replace_all_uses_with(emitter.call(aten.reshape.default, kept, shape))
    emitter.graph.erase_node(flat)


def _drop_round_trips(graph: fx.Graph) -> int:
    """Reads x in the place of x reshaped twice, to another shape and back."""
    memory, sites = Memory(graph), 0
    for node in [n for n in graph.nodes if n.target in RESHAPES]:
        (source,) = node.all_input_nodes
        if source.target not in RESHAPES or memory.written(node) or memory.returned(node):
            continue
        (origin,) = source.all_input_nodes
        if sizes_of(origin) == sizes_of(node):
            node.replace_all_uses_with(origin)
            graph.erase_node(node)
            sites += 1
    return sites


def _by_channel(node: fx.Node, flat: fx.Node) -> bool:
    """True if every operand but `flat` is a number, or a tensor with no axis but that of channels."""
    others = [arg for arg in node.args if arg is not flat]
    return flat in node.args and all(not isinstance(arg, fx.Node) or value_of(arg).dim() <= 1 for arg in others)
