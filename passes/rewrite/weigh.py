"""Calibrated extrapolation: Taylor's weights x^i / i! give way to those of a plan, per step and channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.slots import FeatureSlot, ScalarSlot, TableSlot, Term, slot_of

__all__ = ["WeighFeatures"]

aten = torch.ops.aten

_CARRIES = (aten.to.dtype, aten.index_select.default)
"""Ops between a state tensor and the product with its weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeighFeatures:
    """Multiplies the Taylor terms of features with a plan's coefficients in the place of x^i / i!.

    Before::

        mul = aten.mul.Tensor(sum_y1, x)  # x: f32[], steps since the last full step
        add = aten.add.Tensor(sum_y0, mul)

    After::

        mul_1 = aten.mul.Tensor(sum_y1, sum_y1_weight)  # f32[D] of this step, from the plan
        mul_2 = aten.mul.Tensor(sum_y0, sum_y0_weight)
        add = aten.add.Tensor(mul_2, mul_1)

    Y_0 gets a weight where no row of it is written: a refreshed row holds what makes the estimate the fresh value, and it
    does so for a weight of 1.

    Legal by the plan's word only, as the extrapolation itself: with the weights 1, x, x^2 / 2, ... it is the graph before.
    """

    tables: Mapping[str, tuple[int, ...]]
    """By features: the shape of their coefficients in one step and term, [] or [channels]."""
    name: str = "weigh_features"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        sites = 0
        for node in list(gm.graph.nodes):
            if node.target is not aten.mul.Tensor or not any(_is_taylor(a) for a in node.args):
                continue
            factor = next(a for a in node.args if _is_taylor(a))
            source = next(a for a in node.args if a is not factor)
            state = _state_behind(source)
            assert state is not None, "only Taylor terms are multiplied with powers of x"
            self._weigh(emitter, node, source, state)
            sites += 1
        for node in gm.graph.find_nodes(op="placeholder"):
            slot = _features(node)
            if slot is not None and slot.term == 0:
                sites += self._first(emitter, node)
        for node in gm.graph.find_nodes(op="placeholder"):
            if _is_taylor(node) and not node.users:
                emitter.erase_input(node)
        return sites

    def _weigh(self, emitter: Emitter, product: fx.Node, source: fx.Node, state: fx.Node) -> None:
        with emitter.before(product):
            weighed = self._product(emitter, source, state)
        product.replace_all_uses_with(weighed)
        emitter.graph.erase_node(product)

    def _first(self, emitter: Emitter, state: fx.Node) -> int:
        """Gives Y_0 its weight; 0 if rows of it are written."""
        if any(user.target is aten.index_copy_.default and user.args[0] is state for user in state.users):
            return 0
        readers = list(state.users)
        if len(readers) == 1 and readers[0].target is aten.to.dtype:
            source = readers[0]
            readers = list(source.users)
        else:
            source = state
        if not readers:
            return 0
        with emitter.before(min(readers)):
            weighed = self._product(emitter, source, state)
        source.replace_all_uses_with(weighed, delete_user_cb=lambda user: user in readers)
        return 1

    def _product(self, emitter: Emitter, source: fx.Node, state: fx.Node) -> fx.Node:
        slot = _features(state)
        assert slot is not None
        features = slot.features
        if features not in self.tables:
            raise ValueError(
                f"the plan has no coefficients for the features {features!r} of this model, only for "
                f"{', '.join(map(repr, self.tables)) or 'none'}: calibrate a plan for this model and these options"
            )
        shape, like = self.tables[features], value_of(source)
        if shape not in ((), (like.shape[-1],)):
            raise ValueError(
                f"the plan's coefficients for {features!r} have shape {list(shape)}, and the features have "
                f"{like.shape[-1]} channels: calibrate a plan for this model"
            )
        weight = emitter.table(TableSlot(features, Term("y", slot.term), shape), like.device)
        product = emitter.call(aten.mul.Tensor, source, weight)
        return product if value_of(product).dtype == like.dtype else emitter.call(aten.to.dtype, product, like.dtype)


def _is_taylor(node: object) -> bool:
    """An input that holds x^i / i!."""
    slot = slot_of(node)
    return isinstance(slot, ScalarSlot) and slot.of == "power"


def _features(node: fx.Node) -> FeatureSlot | None:
    """The slot of a state input that holds a Taylor term; None for any other node."""
    slot = slot_of(node)
    return slot if isinstance(slot, FeatureSlot) else None


def _state_behind(node: fx.Node) -> fx.Node | None:
    """The state tensor whose values, or rows of them, a node holds."""
    while node.target in _CARRIES:
        node = node.all_input_nodes[0]
    return None if _features(node) is None else node
