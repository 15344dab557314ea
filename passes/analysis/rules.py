"""Token rules of ops that compute: pointwise ones, those that work along the axes they name, and products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import POINTWISE, argument, dim_of, ints_argument, node_argument, nodes_argument, overloads

from .tokens import Info, Lookup, NoRule, Tokens, normal_dim, one_input, rank_of

__all__ = ["COMPUTING", "Rule", "einsum_letters", "letter_axes"]

aten = torch.ops.aten
Rule = Callable[[fx.Node, Lookup], Info]
Axes = Callable[[fx.Node, int], Iterable[int] | None]

_PRODUCT = "a product over or between token axes has no rule"


def _pointwise(node: fx.Node, look: Lookup) -> Tokens:
    """Broadcasting ops: all inputs with tokens agree once aligned from the right."""
    rank, out = value_of(node).dim(), None
    for source in node.all_input_nodes:
        tokens = look(source)
        if tokens is None:
            continue
        aligned = tokens.at(tokens.dim + rank - rank_of(source))
        if out is not None and aligned != out:
            raise NoRule(node, f"its inputs carry different tokens ({out} and {aligned})")
        out = aligned
    assert out is not None
    if value_of(node).shape[out.dim] != out.size:
        raise NoRule(node, "the token axis is broadcast against itself")
    return out


def _along(axes: Axes) -> Rule:
    """Ops that work along `axes(node, rank)` and keep the axes in front of the tokens; None stands for all axes."""

    def rule(node: fx.Node, look: Lookup) -> Info:
        source, tokens = one_input(node, look)
        touched = axes(node, rank_of(source))
        if touched is None or tokens.dim in {normal_dim(d, rank_of(source)) for d in touched}:
            raise NoRule(node, "it works along the token axis")
        value = value_of(node)
        return tuple(tokens for _ in value) if isinstance(value, (tuple, list)) else tokens

    return rule


def _named(node: fx.Node, rank: int) -> Iterable[int] | None:
    """The axes that the argument `dim`, or `dims`, names; None where it names none."""
    return ints_argument(node, "dim") or ints_argument(node, "dims") or None


def _last(node: fx.Node, rank: int) -> Iterable[int]:
    return [rank - 1]


def _normalized(node: fx.Node, rank: int) -> Iterable[int]:
    return range(rank - len(ints_argument(node, "normalized_shape")), rank)


def _padded(node: fx.Node, rank: int) -> Iterable[int]:
    mode = argument(node, "mode", "constant")
    return [rank - 1 - i // 2 for i, pad in enumerate(ints_argument(node, "pad")) if pad or mode != "constant"]


def _reduction(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    reduced = {normal_dim(d, rank_of(source)) for d in _named(node, rank_of(source)) or range(rank_of(source))}
    if tokens.dim in reduced:
        raise NoRule(node, "it reduces over the token axis")
    keeps = value_of(node).dim() == rank_of(source)
    return tokens if keeps else tokens.at(tokens.dim - sum(d < tokens.dim for d in reduced))


def _index(node: fx.Node, look: Lookup) -> Tokens:
    """x[..., i, j]: the token axis must lie in front of all that is indexed."""
    _source, tokens = one_input(node, look)
    at = [d for d, index in enumerate(argument(node, "indices")) if index is not None]
    if not at or tokens.dim >= at[0]:
        raise NoRule(node, "it picks tokens by an index")
    return tokens


def _gather(node: fx.Node, look: Lookup) -> Tokens:
    """gather and scatter along another axis: all inputs have the tokens at the same place, or come from outside."""
    infos = [info for n in node.all_input_nodes if (info := look(n)) is not None]
    tokens = infos[0]
    sizes = {value_of(n).shape[tokens.dim] for n in node.all_input_nodes if value_of(n).dim()}
    along = dim_of(node, rank_of(node)) == tokens.dim
    if any(info != tokens for info in infos) or along or sizes != {tokens.length}:
        raise NoRule(node, "it picks tokens by an index, or its inputs carry different ones")
    return tokens


def _matmul(node: fx.Node, look: Lookup) -> Tokens:
    left = node_argument(node, "self")
    right = node_argument(node, "other" if node.target is aten.matmul.default else "mat2")
    tokens = look(left)
    if tokens is None or look(right) is not None or tokens.dim == rank_of(left) - 1 or rank_of(right) > rank_of(left):
        raise NoRule(node, _PRODUCT)
    ours = tokens.dim - rank_of(left) + rank_of(right)
    if 0 <= ours < rank_of(right) - 2 and value_of(right).shape[ours] != 1:
        raise NoRule(node, _PRODUCT)
    return tokens


def _bmm(node: fx.Node, look: Lookup) -> Tokens:
    """Batches of matrices: tokens are rows of the left ones, or number the batch on both sides."""
    adds = node.target is aten.baddbmm.default
    left, right = (look(argument(node, name)) for name in (("batch1", "batch2") if adds else ("self", "mat2")))
    if adds and look(argument(node, "self")) is not None:
        raise NoRule(node, "the token axis comes in through an argument that the rule does not expect")
    if left is not None and ((left.dim == 1 and right is None) or (left.dim == 0 and right == left)):
        return left
    raise NoRule(node, _PRODUCT)


def _addmm(node: fx.Node, look: Lookup) -> Tokens:
    bias, left, right = (look(argument(node, name)) for name in ("self", "mat1", "mat2"))
    if left is None or left.dim != 0 or right is not None or bias is not None:
        raise NoRule(node, _PRODUCT)
    return left


def _einsum(node: fx.Node, look: Lookup) -> Tokens:
    """The letter of the token axis is in the result; an input from outside that has it is a table, behind the batch."""
    inputs, result = einsum_letters(node)
    if "." in "".join(inputs) + result or not result:
        raise NoRule(node, "an einsum with `...` or without `->` has no rule")
    terms = list(zip(inputs, nodes_argument(node, "tensors"), strict=True))
    first, found = next((letters, info) for letters, source in terms if (info := look(source)) is not None)
    letter = first[found.dim]
    for letters, source in terms:
        info = look(source)
        if info is not None and letters[info.dim] != letter:
            raise NoRule(node, _PRODUCT)
        table = info is None and letter in letters
        if (info is not None and info.segments != found.segments) or (
            table and not _behind_batch(letters, letter, first)
        ):
            raise NoRule(node, "its inputs carry different tokens")
    if letter not in result:
        raise NoRule(node, _PRODUCT)
    return found.at(result.index(letter))


def einsum_letters(node: fx.Node) -> tuple[list[str], str]:
    """The letters of an einsum's inputs, and those of its result."""
    left, _, right = str(argument(node, "equation")).replace(" ", "").partition("->")
    return left.split(","), right


def _behind_batch(letters: str, letter: str, first: str) -> bool:
    """Whether a table has its token axis once, and in front of it what the tokens have in front: the batch."""
    return letters.count(letter) == 1 and letters[0] == first[0] != letter


def letter_axes(node: fx.Node, dim: int) -> list[int | None]:
    """Where an einsum's inputs have the letter of axis `dim` of the result; None where they have not."""
    inputs, result = einsum_letters(node)
    return [letters.index(result[dim]) if result[dim] in letters else None for letters in inputs]


def _point_conv(node: fx.Node, look: Lookup) -> Tokens:
    """A convolution with a kernel of 1 along the token axis, without stride or padding there."""
    source, tokens = one_input(node, look)
    dim, rank = tokens.dim - 2, rank_of(source)
    kernel = value_of(node_argument(node, "weight")).shape[2:]
    stride, padding = argument(node, "stride"), argument(node, "padding")
    if dim < 0 or isinstance(padding, str) or rank != len(kernel) + 2:
        raise NoRule(node, "it works along the token axis")
    here = [v[dim % len(v)] if isinstance(v, (list, tuple)) else v for v in (stride, padding)]
    if kernel[dim] != 1 or here != [1, 0]:
        raise NoRule(node, "it works along the token axis")
    return tokens


COMPUTING: Mapping[Any, Rule] = {
    **dict.fromkeys(POINTWISE | overloads("expand_as"), _pointwise),
    **dict.fromkeys(overloads("linear", "view_as_real", "view_as_complex"), _along(_last)),
    **dict.fromkeys(overloads("layer_norm", "rms_norm"), _along(_normalized)),
    **dict.fromkeys(
        overloads(
            "softmax", "_softmax", "log_softmax", "cumsum", "glu", "flip", "roll", "sort", "argsort", "topk",
            "index_select", "repeat_interleave",
        ),
        _along(_named),
    ),
    **dict.fromkeys(overloads("pad", "constant_pad_nd"), _along(_padded)),
    **dict.fromkeys(
        overloads("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm"), _reduction
    ),
    **dict.fromkeys(overloads("index"), _index),
    **dict.fromkeys(overloads("gather", "scatter"), _gather),
    **dict.fromkeys(overloads("matmul", "mm"), _matmul),
    **dict.fromkeys(overloads("bmm", "baddbmm"), _bmm),
    **dict.fromkeys(overloads("addmm"), _addmm),
    **dict.fromkeys(overloads("einsum"), _einsum),
    **dict.fromkeys(overloads("conv1d", "conv2d", "conv3d"), _point_conv),
}  # fmt: skip
"""By overload; an op that is not here, nor in `MOVING`, has no rule."""
