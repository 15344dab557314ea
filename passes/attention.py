"""The attention ops: where each takes queries, keys, values and mask, and what it must not be asked for.

An op is known by its qualified name, so that ops of packages that are not installed can stand in the table. Arguments are
looked up by their names in the op's schema: positions, keywords and defaults come out the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from .compat import HigherOrderOperator, schema_of
from .ops import argument

__all__ = ["ATTENTION", "AttentionOp"]


@dataclass(frozen=True, slots=True)
class AttentionOp:
    """Names of an attention op's arguments, and the layout of its queries, keys and values."""

    query: int = 0
    key: int = 1
    value: int = 2
    mask: str | None = None
    dim: int = -2
    """The token axis: -2 for [B, heads, tokens, width], -3 for [B, tokens, heads, width]."""
    scale: str = "scale"
    lengths: tuple[str, ...] = ()
    """Arguments that hold the number of queries, then that of keys."""
    refused: str = ""
    """Why no branch with this op can be computed for a part of its tokens."""

    @property
    def heads(self) -> int:
        """The axis of the heads."""
        return -3 if self.dim == -2 else -2

    def operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The queries, keys and values of a call."""
        query, key, value = (node.args[i] for i in (self.query, self.key, self.value))
        assert isinstance(query, fx.Node)
        assert isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        return query, key, value

    def ordered(self, node: fx.Node, whole: bool = False) -> str:
        """What makes a call depend on the order or the number of its tokens; empty if nothing does.

        `whole`: a step computes all of its tokens or none, so that their order and number stay the same.
        """
        if self.refused:
            return self.refused
        for name, allowed in _PLAIN.items():
            if not whole and argument(node, name, allowed[0]) not in allowed:
                return f"{name}={argument(node, name)!r}: it depends on the order of the tokens"
        given = {*self.operands(node), argument(node, self.mask or "")}
        more = [n.name for n in node.all_input_nodes if n not in given]
        return f"it reads {more[0]}, and no rule says what that is" if more else ""


# Arguments that say which keys a query sees, and the values with which each query sees all of them.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "causal": (False,),
    "custom_mask_type": (0,),
    "window_size": ((-1, -1), [-1, -1], None),
    "window_size_left": (-1, None),
    "window_size_right": (-1, None),
    "attention_chunk": (0, None),
}

_PACKED = AttentionOp(dim=-3, refused="it takes sequences of several lengths, packed end to end")

_BY_NAME: dict[str, AttentionOp] = {
    "aten::scaled_dot_product_attention": AttentionOp(mask="attn_mask"),
    "aten::_scaled_dot_product_attention_math": AttentionOp(mask="attn_mask"),
    "aten::_scaled_dot_product_flash_attention": AttentionOp(),
    "aten::_scaled_dot_product_flash_attention_for_cpu": AttentionOp(mask="attn_mask"),
    "aten::_scaled_dot_product_efficient_attention": AttentionOp(mask="attn_bias"),
    "aten::_scaled_dot_product_cudnn_attention": AttentionOp(mask="attn_bias"),
    "aten::_scaled_dot_product_fused_attention_overrideable": AttentionOp(mask="attn_bias"),
    "aten::_flash_attention_forward": AttentionOp(dim=-3, lengths=("max_q", "max_k")),
    "aten::_efficient_attention_forward": AttentionOp(dim=-3, mask="bias", lengths=("max_seqlen_q", "max_seqlen_k")),
    # flash-attn 2 and 3, and what diffusers' dispatcher registers for the latter
    "flash_attn::_flash_attn_forward": AttentionOp(dim=-3, scale="softmax_scale"),
    "flash_attn::_flash_attn_varlen_forward": _PACKED,
    "flash_attn_3::_flash_attn_forward": AttentionOp(dim=-3, scale="softmax_scale"),
    "flash_attn_3::fwd": AttentionOp(dim=-3, scale="softmax_scale"),
    "_diffusers_flash_attn_3::_flash_attn_forward": AttentionOp(dim=-3, scale="softmax_scale"),
    "flex_attention": AttentionOp(refused="what a query sees is a function of its place (score_mod, block_mask)"),
}


class _Table(Mapping[Any, AttentionOp]):
    """Looks ops up by what a graph calls."""

    def __getitem__(self, target: Any) -> AttentionOp:
        return _BY_NAME[_name(target)]

    def __iter__(self) -> Iterator[Any]:
        return iter(_BY_NAME)

    def __len__(self) -> int:
        return len(_BY_NAME)


def _name(target: Any) -> str:
    if isinstance(target, HigherOrderOperator):
        return str(target.name())
    schema = schema_of(target)
    return target if isinstance(target, str) else "" if schema is None else str(schema.name)


ATTENTION: Mapping[Any, AttentionOp] = _Table()
"""By call target."""
