"""Residual updates that a model writes as one fused op: split so that they are found, and fused again where untouched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.tokens import sizes_of
from hero_fx.passes.emit import Emitter, drop_dead_code, value_of
from hero_fx.passes.ops import argument

__all__ = ["FuseUpdates", "SplitUpdates"]

aten = torch.ops.aten
_MARK, _FACTOR = "fused_update", "fused_factor"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitUpdates:
    """Writes `addcmul`, and an `add` with a factor, as a product and an `add`: the form in which branches are found.

    Before::

        addcmul = aten.addcmul.default(x, gate, linear)

    After::

        mul = aten.mul.Tensor(gate, linear)
        add = aten.add.Tensor(x, mul)

    Legal together with `FuseUpdates`, which puts back the op wherever the product is still its own: it rounds once where
    the two ops round twice. What a pass has changed stays split, and is exact up to rounding.
    """

    name: str = "split_updates"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, sites = Emitter(gm), 0
        for node in list(gm.graph.nodes):
            if not _is_update(node):
                continue
            with emitter.before(node):
                whole, product = node.args[0], _product(emitter, node)
                add = emitter.call(aten.add.Tensor, whole, product)
            add.meta[_MARK] = product.meta[_MARK] = True
            if value_of(add).dtype != value_of(node).dtype:  # it would promote in another way
                emitter.graph.erase_node(add)
                continue
            add.meta["val"] = value_of(node)
            node.replace_all_uses_with(add)
            gm.graph.erase_node(node)
            sites += 1
        if sites:
            drop_dead_code(gm.graph)
        return sites


def _is_update(node: fx.Node) -> bool:
    """An op x + a * b (* number) on floats that keeps x's shape and dtype."""
    if node.op != "call_function" or node.target not in (aten.addcmul.default, aten.add.Tensor):
        return False
    parts = [value_of(n) for n in node.args if isinstance(n, fx.Node)]
    if len(parts) < 2 or not all(v.is_floating_point() for v in parts) or len({v.dtype for v in parts}) > 1:
        return False
    whole = node.args[0]
    if node.target is aten.add.Tensor:
        alpha = argument(node, "alpha")
        return isinstance(alpha, (int, float)) and alpha != 1 and sizes_of(node.args[1]) == sizes_of(node)
    return len(parts) == 3 and sizes_of(whole) == sizes_of(node)


def _product(emitter: Emitter, node: fx.Node) -> fx.Node:
    if node.target is aten.add.Tensor:
        return emitter.call(aten.mul.Tensor, node.args[1], argument(node, "alpha"))
    first, second = node.args[1:3]
    value = argument(node, "value")
    if value != 1:
        first = emitter.call(aten.mul.Tensor, first, value)
        first.meta[_FACTOR] = True
    return emitter.call(aten.mul.Tensor, first, second)


@dataclass(frozen=True, kw_only=True, slots=True)
class FuseUpdates:
    """Puts back the fused ops that `SplitUpdates` has taken apart, where their product is still what is added.

    Before::

        mul = aten.mul.Tensor(gate, linear)
        add = aten.add.Tensor(x, mul)

    After::

        addcmul = aten.addcmul.default(x, gate, linear)

    Legal because it is the model's own op on its own operands, or on what a pass has put in their place: a full step gives
    what the model gives, bit for bit.
    """

    name: str = "fuse_updates"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, sites = Emitter(gm), 0
        for node in list(gm.graph.nodes):
            product = node.args[1] if node.target is aten.add.Tensor and _MARK in node.meta else None
            if not isinstance(product, fx.Node) or _MARK not in product.meta or product.target is not aten.mul.Tensor:
                continue
            first, second = product.args
            with emitter.before(node):
                if not isinstance(second, fx.Node):
                    fused = emitter.call(aten.add.Tensor, node.args[0], first, alpha=second)
                elif isinstance(first, fx.Node) and _FACTOR in first.meta:
                    fused = emitter.call(aten.addcmul.default, node.args[0], first.args[0], second, value=first.args[1])
                else:
                    fused = emitter.call(aten.addcmul.default, node.args[0], first, second)
            node.replace_all_uses_with(fused)
            gm.graph.erase_node(node)
            sites += 1
        if sites:
            drop_dead_code(gm.graph)
        return sites
