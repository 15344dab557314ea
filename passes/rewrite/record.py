"""Full steps: record the features that cached steps will read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.structure import Branch, Structure
from hero_fx.passes.analysis.tokens import Tokens, normal_dim
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import Emitter, by_name, value_of
from hero_fx.passes.ops import argument_of
from hero_fx.passes.slots import StateSlot

from .plan import Recording, Refresh, ScoredRefresh, analyse, cached_node, gate_of, self_attention, term_slot

__all__ = ["RecordFeatures", "image_range", "key_slots", "score_slots"]

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
        emitter = Emitter(gm)
        nodes = by_name(gm)
        sites = 0
        scores: dict[fx.Node, fx.Node] = {}
        for recording in self.recordings:
            branch = recording.branch
            for update in branch.updates:
                feature = cached_node(nodes, update, recording.cache_point)
                slots = [term_slot(branch, self.structure.streams, update, i) for i in range(recording.terms)]
                if recording.gate:
                    gated = gate_of(nodes, update, self.structure.streams[update.stream].tokens)
                    assert gated is not None, "resolve has seen the gate"
                    self._gate(emitter, feature, gated, slots)
                else:
                    self._terms(emitter, feature, slots)
                sites += 1
            if recording.keys is not None:
                sites += self._keys(emitter, nodes, recording)
            if recording.score is not None:
                self._score(emitter, nodes, branch, recording.score, scores)
                sites += 1
        return sites

    def _terms(self, emitter: Emitter, feature: fx.Node, slots: list[StateSlot]) -> None:
        """Y_0 = F and Y_i = (Y_{i-1} - Y_{i-1} of the full step before) / d."""
        value, writes = feature, []
        with emitter.before(emitter.output):
            for i, slot in enumerate(slots):
                state = emitter.state(slot, value_of(feature), self.state_dtype)
                writes.append((state, value))
                if i + 1 < len(slots):
                    gap = emitter.scalar(f"inverse_gap_{i + 1}", value_of(feature).device)
                    change = emitter.call(aten.sub.Tensor, value, emitter.read(state, value_of(feature)))
                    value = emitter.call(aten.mul.Tensor, change, gap)
            for state, new in writes:
                emitter.write_back(state, new)

    def _gate(self, emitter: Emitter, feature: fx.Node, gated: tuple[fx.Node, fx.Node], slots: list[StateSlot]) -> None:
        """Y_0 = g F and Y_1 = (g - g of the full step before) F / d: how far the gate alone moves the update per step."""
        gate, scaled = gated
        with emitter.before(emitter.output):
            before = emitter.state(
                StateSlot(f"{slots[0].name.removesuffix('_y0')}_gate", ("gate", slots[0])), value_of(gate)
            )
            gap = emitter.scalar("inverse_gap_1", value_of(gate).device)
            change = emitter.call(aten.mul.Tensor, emitter.call(aten.sub.Tensor, gate, before), gap)
            slope = emitter.call(aten.mul.Tensor, change, scaled)
            for slot, value in zip(slots, (feature, slope), strict=True):
                emitter.write_back(emitter.state(slot, value_of(value), self.state_dtype), value)
            emitter.write_back(before, gate)

    def _keys(self, emitter: Emitter, nodes: Mapping[str, fx.Node], recording: Recording) -> int:
        """Keys and values, as attention gets them: of all tokens, or of those that cached steps see without computing them."""
        sites = 0
        analysis = analyse(nodes, self.structure, recording.branch, recording.cache_point)
        for number, name in enumerate(recording.branch.attention):
            node = nodes[name]
            op = ATTENTION[node.target]
            for role, argument in (("k", op.key), ("v", op.value)):
                source = node.args[argument]
                assert isinstance(source, fx.Node)
                tokens = analysis.infos.get(source)
                if not isinstance(tokens, Tokens) or tokens.dim != normal_dim(op.dim, value_of(source).dim()):
                    continue
                for slot, start, stop, step in key_slots(recording.branch, number, role, tokens, recording):
                    with emitter.before(emitter.output):
                        piece = source
                        if stop - start != tokens.length or step != 1:
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
        known: dict[fx.Node, fx.Node],
    ) -> None:
        """The part of a token's score that full steps measure, and its age, which they reset."""
        attention = self_attention(nodes, self.structure, branch)
        op = ATTENTION[attention.target]
        start, stop = image_range(nodes, self.structure, attention)

        def heads_first(x: torch.Tensor) -> torch.Tensor:
            return x if op.dim == -2 else x.transpose(1, 2)

        if attention not in known:
            with emitter.before(emitter.output):
                if strategy.score == "attention":
                    query, key = attention.args[op.query], attention.args[op.key]
                    assert isinstance(query, fx.Node)
                    assert isinstance(key, fx.Node)
                    scale = argument_of(attention, op.scale) or value_of(query).shape[-1] ** -0.5
                    known[attention] = emitter.inline(
                        lambda q, k: attention_received(heads_first(q), heads_first(k), scale, start, stop), query, key
                    )
                else:
                    values = attention.args[op.value]
                    assert isinstance(values, fx.Node)
                    known[attention] = emitter.inline(lambda v: small_values(heads_first(v), start, stop), values)
        score_slot, stamp_slot = score_slots(branch)
        score = emitter.state(score_slot, value_of(known[attention]))
        stamp = emitter.state(stamp_slot, value_of(known[attention]))
        emitter.write_back(score, known[attention])
        with emitter.before(emitter.output):
            fresh = emitter.call(aten.zeros_like.default, stamp)
        emitter.write_back(stamp, fresh)


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


def image_range(nodes: Mapping[str, fx.Node], structure: Structure, attention: fx.Node) -> tuple[int, int]:
    """Where the image tokens are among the keys of an attention node."""
    branch = next(b for b in structure.branches if attention.name in b.attention)
    key = attention.args[ATTENTION[attention.target].key]
    tokens = analyse(nodes, structure, branch, "pre_gate").infos[key]  # type: ignore[index]
    assert isinstance(tokens, Tokens)
    return next((start, stop) for segment, start, stop in tokens.spans() if segment.source.is_image)


def key_slots(
    branch: Branch, number: int, role: str, tokens: Tokens, keys: Recording | Refresh
) -> list[tuple[StateSlot, int, int, int]]:
    """State for keys (`role` "k") or values ("v") of one attention op: (slot, first token, end, step) of what is kept."""
    base = f"{branch.label}_{role}{number or ''}"
    if keys.keys == "all":
        return [(StateSlot(base, (branch.label, number, role)), 0, tokens.length, 1)]
    slots, names = [], list[str]()
    for segment, start, stop in tokens.spans():
        image = segment.source.is_image or segment.source.is_outside
        if not image or keys.keys == "landmarks":
            name = "landmarks" if image else str(segment.source)
            names.append(name)
            # A sequence may hold the same tokens twice, each with keys of its own.
            again = f"_{names.count(name) - 1}" if names.count(name) > 1 else ""
            slot = StateSlot(f"{base}_{name}{again}", (branch.label, number, role, start))
            slots.append((slot, start, stop, keys.stride if image else 1))
    return slots


def score_slots(branch: Branch) -> tuple[StateSlot, StateSlot]:
    """(measured score [B, N], step at which each token was last fresh [B, N]) of a branch."""
    score, stamp = (StateSlot(f"{branch.label}_{what}", (branch.label, what)) for what in ("score", "stamp"))
    return score, stamp
