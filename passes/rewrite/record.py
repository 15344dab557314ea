"""Full steps: record the features that cached steps will read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from hero_fx.passes.analysis.model_writes import attended
from hero_fx.passes.analysis.structure import Branch, Structure
from hero_fx.passes.analysis.tokens import Tokens, normal_dim
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import Emitter, by_name, value_of
from hero_fx.passes.ops import argument
from hero_fx.passes.slots import FeatureSlot, GateSlot, ScalarSlot

from .features import cached_node, feature_slots, gate_of, key_slots, score_slots
from .plan import Recording, Refresh, ScoredBy, ScoredRefresh

__all__ = ["RecordFeatures"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordFeatures:
    """Keeps each branch's features, and their differences to the full step before, in feature state.

    Before::

        linear = aten.linear.default(norm, weight)
        mul = aten.mul.Tensor(gate, linear)
        add = aten.add.Tensor(x, mul)

    After, with two Taylor terms (Eq. 6: the features and their difference per step)::

        linear, mul, add as before
        sub = aten.sub.Tensor(linear, y0)
        mul_1 = aten.mul.Tensor(sub, inverse_gap_1)         # 1 / d, or 0 while there is no full step before
        copy_ = aten.copy_.default(y0, linear)
        copy__1 = aten.copy_.default(y1, mul_1)

    Legal because it only adds readers of existing values and writes to inputs that nothing else in the graph reads
    after the write: all `copy_` stand at the end. The outputs are those of the untouched graph, bit for bit.
    """

    structure: Structure
    recordings: tuple[Recording, ...]
    state_dtype: torch.dtype | None = None
    name: str = "record_features"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, nodes = Emitter(gm), by_name(gm)
        sites = 0
        scores: dict[str, fx.Node] = {}
        for recording in self.recordings:
            for update in recording.branch.updates:
                feature = cached_node(nodes, update, recording.cache_point)
                slots = feature_slots(self.structure, recording.branch, update, recording.terms)
                if recording.gate:
                    gated = gate_of(nodes, self.structure, update)
                    assert gated is not None, "resolve has seen the gate"
                    self._gate(emitter, feature, gated, slots)
                else:
                    self._terms(emitter, feature, slots)
                sites += 1
            if recording.keys is not None:
                sites += self._keys(emitter, nodes, recording.branch, recording.keys)
            if recording.score is not None:
                self._score(emitter, nodes, recording.branch, recording.score, scores)
                sites += 1
        return sites

    def _terms(self, emitter: Emitter, feature: fx.Node, slots: list[FeatureSlot]) -> None:
        """Y_0 = F and Y_i = (Y_{i-1} - Y_{i-1} of the full step before) / d."""
        value, writes = feature, []
        with emitter.before(emitter.output):
            for i, slot in enumerate(slots):
                state = emitter.state(slot, value_of(feature), self.state_dtype)
                writes.append((state, value))
                if i + 1 < len(slots):
                    gap = emitter.scalar(ScalarSlot("inverse_gap", i + 1), value_of(feature).device)
                    change = emitter.call(aten.sub.Tensor, value, emitter.read(state, value_of(feature)))
                    value = emitter.call(aten.mul.Tensor, change, gap)
            for state, new in writes:
                emitter.write_back(state, new)

    def _gate(
        self, emitter: Emitter, feature: fx.Node, gated: tuple[fx.Node, fx.Node], slots: list[FeatureSlot]
    ) -> None:
        """Y_0 = g F and Y_1 = (g - g of the full step before) F / d: how far the gate alone moves the update per step."""
        gate, scaled = gated
        with emitter.before(emitter.output):
            before = emitter.state(GateSlot(slots[0]), value_of(gate))
            gap = emitter.scalar(ScalarSlot("inverse_gap"), value_of(gate).device)
            change = emitter.call(aten.mul.Tensor, emitter.call(aten.sub.Tensor, gate, before), gap)
            slope = emitter.call(aten.mul.Tensor, change, scaled)
            for slot, value in zip(slots, (feature, slope), strict=True):
                emitter.write_back(emitter.state(slot, value_of(value), self.state_dtype), value)
            emitter.write_back(before, gate)

    def _keys(self, emitter: Emitter, nodes: Mapping[str, fx.Node], branch: Branch, strategy: Refresh) -> int:
        """Keys and values, as attention gets them: of all tokens, or of those that cached steps see without computing them."""
        assert strategy.tokens is not None, "`resolve` comes before recording"
        sites = 0
        for number, name in enumerate(branch.attention):
            op = ATTENTION[nodes[name].target]
            _, key, value = attended(nodes[name])
            parts: tuple[tuple[Literal["k", "v"], fx.Node], ...] = (("k", key), ("v", value))
            for part, source in parts:
                tokens = strategy.tokens.infos.get(source.name)
                if not isinstance(tokens, Tokens) or tokens.dim != normal_dim(op.dim, value_of(source).dim()):
                    continue
                for slot, start, stop, step in key_slots(branch, number, part, tokens, strategy):
                    with emitter.before(emitter.output):
                        piece = source
                        if stop - start != tokens.size or step != 1:
                            piece = emitter.call(aten.slice.Tensor, source, tokens.dim, start, stop, step)
                        state = emitter.state(slot, value_of(piece), self.state_dtype)
                        emitter.write_back(state, piece)
                    sites += 1
        return sites

    def _score(
        self,
        emitter: Emitter,
        nodes: Mapping[str, fx.Node],
        branch: Branch,
        strategy: ScoredRefresh,
        known: dict[str, fx.Node],
    ) -> None:
        """The part of a token's score that full steps measure, and its age, which they reset; `known`: by attention node."""
        assert strategy.scored_by is not None, "`resolve` comes before recording"
        name = strategy.scored_by.attention
        with emitter.before(emitter.output):
            if name not in known:
                known[name] = _measured(emitter, nodes[name], strategy.score, strategy.scored_by)
        score, stamp = (emitter.state(slot, value_of(known[name])) for slot in score_slots(branch))
        emitter.write_back(score, known[name])
        with emitter.before(emitter.output):
            fresh = emitter.call(aten.zeros_like.default, stamp)
        emitter.write_back(stamp, fresh)


def _measured(emitter: Emitter, node: fx.Node, score: Literal["attention", "values"], by: ScoredBy) -> fx.Node:
    """The score of each image token by an attention node."""
    op = ATTENTION[node.target]
    query, key, value = attended(node)

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x if op.dim == -2 else x.transpose(1, 2)

    if score == "values":
        return emitter.inline(lambda v: small_values(heads_first(v), by.start, by.stop), value)
    scale = argument(node, op.scale) or value_of(query).shape[-1] ** -0.5
    return emitter.inline(
        lambda q, k: attention_received(heads_first(q), heads_first(k), scale, by.start, by.stop), query, key
    )


def attention_received(query: torch.Tensor, key: torch.Tensor, scale: float, start: int, stop: int) -> torch.Tensor:
    """ToCa's score [B, N]: column sums of softmax(q k^T) over all queries, mean over heads, of unit length over the image.

    Args:
        query: [B, heads, L, head_dim]; key likewise, or with fewer heads, each for a group of the queries';
            `start:stop` are the image tokens among the keys.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    weights = torch.softmax(torch.matmul(query * scale, key.transpose(-2, -1)).float(), dim=-1)
    received = weights.sum(dim=-2).mean(dim=1)[:, start:stop]
    return torch.nn.functional.normalize(received, p=2.0, dim=1)


def small_values(values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """DuCa's score [B, N]: 1 - |v| / max |v| over the image tokens, for values [B, heads, L, head_dim]."""
    image = values[:, :, start:stop].float()
    norm = image.square().sum(dim=(1, 3)).sqrt()
    return 1.0 - norm / norm.amax(dim=1, keepdim=True)
