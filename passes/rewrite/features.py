"""What is cached of a branch: at which node its features are, behind which gate, and in which slots they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import fx

from hero_fx.passes.analysis.structure import Branch, Structure, Update
from hero_fx.passes.analysis.tokens import Tokens
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.slots import FeatureSlot, KeySlot, ScalarSlot, ScoreSlot

from .plan import CachePoint, Refresh

__all__ = ["cached_node", "feature_slots", "gate_of", "key_slots", "score_slots", "taylor"]

aten = torch.ops.aten


def cached_node(nodes: Mapping[str, fx.Node], update: Update, cache_point: CachePoint) -> fx.Node:
    """The node whose value is cached: the feature, or the gated update; `nodes` are the graph's by name."""
    return nodes[update.feature if cache_point == "pre_gate" else update.update]


def gate_of(nodes: Mapping[str, fx.Node], structure: Structure, update: Update) -> tuple[fx.Node, fx.Node] | None:
    """(gate, what it scales) if the update of tokens [.., L, D] is their product with one gate for all tokens."""
    node = nodes[update.update]
    if node.target is not aten.mul.Tensor:
        return None
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    dim = structure.streams[update.stream].tokens.dim - value_of(node).dim()
    for gate, scaled in ((a, b), (b, a)):
        shape = value_of(gate).shape
        if (len(shape) < -dim or shape[dim] == 1) and value_of(scaled).shape == value_of(node).shape:
            return gate, scaled
    return None


def feature_slots(structure: Structure, branch: Branch, update: Update, terms: int) -> list[FeatureSlot]:
    """State for the Taylor terms Y_0 .. Y_{terms-1} of one update of a branch."""
    number = [u.add for u in branch.updates if u.stream == update.stream].index(update.add)
    stream = structure.streams[update.stream].name
    return [FeatureSlot(branch.label, stream, number, term) for term in range(terms)]


def key_slots(
    branch: Branch, attention: int, part: Literal["k", "v"], tokens: Tokens, strategy: Refresh
) -> list[tuple[KeySlot, int, int, int]]:
    """State for the keys or values of one attention op: (slot, first token, end, step) of what is kept.

    Args:
        attention: which of the branch's attention ops.
        tokens: of its keys and values.
    """
    if strategy.keys == "all":
        return [(KeySlot(branch.label, attention, part), 0, tokens.size, 1)]
    slots: list[tuple[KeySlot, int, int, int]] = []
    names: list[str] = []
    for segment, start, stop in tokens.spans():
        image = segment.source.is_image or segment.source.is_outside
        if image and strategy.keys != "landmarks":
            continue
        name = "landmarks" if image else str(segment.source)
        slot = KeySlot(branch.label, attention, part, name, names.count(name))
        slots.append((slot, start, stop, strategy.stride if image else 1))
        names.append(name)
    return slots


def score_slots(branch: Branch) -> tuple[ScoreSlot, ScoreSlot]:
    """(measured score [B, N], step at which each token was last fresh [B, N]) of a branch."""
    return ScoreSlot(branch.label, "score"), ScoreSlot(branch.label, "stamp")


def taylor(
    emitter: Emitter, slots: list[FeatureSlot], like: torch.Tensor, dtype: torch.dtype | None
) -> tuple[fx.Node, list[fx.Node]]:
    """The estimate sum_i Y_i x^i / i! as a node, and the state inputs Y_i; call inside `emitter.before(...)`."""
    states = [emitter.state(slot, like, dtype) for slot in slots]
    estimate = emitter.read(states[0], like)
    for i, state in enumerate(states[1:], start=1):
        weight = emitter.scalar(ScalarSlot("power", i), like.device)
        term = emitter.call(aten.mul.Tensor, emitter.read(state, like), weight)
        estimate = emitter.call(aten.add.Tensor, estimate, term)
    return estimate, states
