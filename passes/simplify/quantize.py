"""8-bit feature state: floats, whose rows are written as bytes because few backends can scatter them, and int8 with scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.slots import ScaleSlot, StateSlot, slots_of

__all__ = ["QuantizeState", "WriteBytes"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class WriteBytes:
    """Writes the sampled rows of a state tensor of an 8-bit float as the bytes they are.

    Before::

        index_copy_ = aten.index_copy_.default(y0, 1, idx, rows)  # y0 and rows are float8_e4m3fn

    After::

        view = aten.view.dtype(y0, torch.uint8)
        view_1 = aten.view.dtype(rows, torch.uint8)
        index_copy_ = aten.index_copy_.default(view, 1, idx, view_1)

    Legal because copying rows changes no bits, whatever they stand for; a view of the state is the state.
    """

    name: str = "write_bytes"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        sites = 0
        for node in list(gm.graph.nodes):
            if node.target is not aten.index_copy_.default:
                continue
            state, dim, index, rows = node.args
            dtype = value_of(state).dtype
            if not _is_state(state) or not dtype.is_floating_point or dtype.itemsize != 1:
                continue
            with emitter.before(node):
                view, bits = (emitter.call(aten.view.dtype, x, torch.uint8) for x in (state, rows))
                written = emitter.call(aten.index_copy_.default, view, dim, index, bits)
            node.replace_all_uses_with(state)
            assert not written.users
            gm.graph.erase_node(node)
            sites += 1
        return sites


@dataclass(frozen=True, slots=True)
class QuantizeState:
    """Keeps feature state as int8 with one float32 scale per token (of keys and values: per token and head).

    Before::

        add = aten.add.Tensor(x, y0)  # y0: f32[B, N, D], feature state
        index_copy_ = aten.index_copy_.default(y0, 1, idx, rows)

    After::

        to = aten.to.dtype(y0, f32)  # y0: i8[B, N, D]
        mul = aten.mul.Tensor(to, y0_scale)  # f32[B, N, 1]
        add = aten.add.Tensor(x, mul)
        # q = round(127 rows / amax |rows|), s = amax |rows| / 127, the largest of each token
        index_copy_ = aten.index_copy_.default(y0, 1, idx, q)
        index_copy__1 = aten.index_copy_.default(y0_scale, 1, idx, s)

    Legal up to rounding by at most half a scale, because a token's scale depends on that token alone: writing rows of
    values is writing their rows of whole numbers and of scales. Runs last: all other passes see values.
    """

    name: str = "quantize_state"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        states = {node: slot for node, slot in slots_of(gm) if isinstance(slot, StateSlot) and _has_tokens(node)}
        scales: dict[fx.Node, fx.Node] = {}
        likes: dict[fx.Node, torch.Tensor] = {}
        for node, slot in states.items():
            likes[node] = value_of(node)
            with emitter.mode:
                like = torch.empty(*likes[node].shape[:-1], 1, device=likes[node].device)
                node.meta["val"] = torch.empty(likes[node].shape, dtype=torch.int8, device=likes[node].device)
            scales[node] = emitter.state(ScaleSlot(slot), like)
        values: dict[fx.Node, fx.Node] = {}
        for node in list(gm.graph.nodes):
            target = node.args[0] if node.target in (aten.copy_.default, aten.index_copy_.default) else None
            for state in [argument for argument in node.all_input_nodes if argument in states]:
                if state is target and node.args.count(state) == 1:
                    continue
                if state not in values:
                    with emitter.before(node):
                        whole = emitter.call(aten.to.dtype, state, likes[state].dtype)
                        scale = emitter.read(scales[state], likes[state])
                        values[state] = emitter.call(aten.mul.Tensor, whole, scale)
                node.replace_input_with(state, values[state])
            if target in states:
                node.replace_all_uses_with(target)
                self._write(emitter, node, scales[target])
                values.pop(target, None)  # a later reader sees what was written
        return len(states)

    @staticmethod
    def _write(emitter: Emitter, node: fx.Node, scale: fx.Node) -> None:
        state, *where, rows = node.args
        assert isinstance(rows, fx.Node)
        with emitter.before(node):
            whole, largest = (emitter.inline(function, rows) for function in (_whole_numbers, _scales))
            emitter.call(node.target, state, *where, whole)
            emitter.call(node.target, scale, *where, largest)
        emitter.graph.erase_node(node)


def _is_state(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("slot"), StateSlot)


def _has_tokens(node: fx.Node) -> bool:
    """Features, keys and values [.., N, D]; not scores [B, N], nor gates, which have one token."""
    value = value_of(node)
    return bool(value.is_floating_point() and value.dim() >= 3 and value.shape[-2] > 1 and value.shape[-1] > 1)


def _scales(rows: torch.Tensor) -> torch.Tensor:
    return rows.float().abs().amax(dim=-1, keepdim=True) / 127


def _whole_numbers(rows: torch.Tensor) -> torch.Tensor:
    scale = (rows.float().abs().amax(dim=-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(rows.float() / scale).to(torch.int8)
