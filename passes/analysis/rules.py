"""Token rules of ops that move or mix values along the axes they name, and along no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from hero_fx.passes.emit import value_of

from .tokens import Lookup, NoRule, Tokens, normal_dim, one_input, rank_of

__all__ = ["OTHER_AXES", "argument", "letter_axes", "narrow_bounds"]

aten = torch.ops.aten


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def along(dims: Callable[[fx.Node, int], Sequence[int] | None]) -> Callable[[fx.Node, Lookup], Any]:
    """Ops of unchanged rank that work along `dims(node, rank)`; None stands for all axes."""

    def rule(node: fx.Node, look: Lookup) -> Any:
        source, tokens = one_input(node, look)
        touched = dims(node, rank_of(source))
        if touched is None or tokens.dim in {normal_dim(d, rank_of(source)) for d in touched}:
            raise NoRule(node, "it works along the token axis")
        value = value_of(node)
        return tuple(tokens for _ in value) if isinstance(value, (tuple, list)) else tokens

    return rule


def _one_dim(position: int, default: int | None = None) -> Callable[[fx.Node, int], Sequence[int] | None]:
    def dims(node: fx.Node, rank: int) -> Sequence[int] | None:
        dim = argument(node, position, "dim", default)
        return None if dim is None else [dim]

    return dims


def _dims(node: fx.Node, rank: int) -> Sequence[int] | None:
    dims = argument(node, 2 if node.target is aten.roll.default else 1, "dims")
    return dims or None


def _padded(node: fx.Node, rank: int) -> Sequence[int] | None:
    pads: list[int] = argument(node, 1, "pad")
    mode = argument(node, 2, "mode", "constant")
    return [rank - 1 - i // 2 for i, pad in enumerate(pads) if pad or mode != "constant"]


def _repeat(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    times: Sequence[int] = argument(node, 1, "repeats")
    dim = tokens.dim + len(times) - rank_of(source)
    if times[dim] != 1:
        raise NoRule(node, "it repeats the token axis")
    return tokens.at(dim)


def narrow_bounds(node: fx.Node) -> tuple[int, int, int]:
    """(dim, start, stop) of an `aten.narrow` node."""
    dim, start, length = (argument(node, i, name) for i, name in ((1, "dim"), (2, "start"), (3, "length")))
    dim = normal_dim(dim, rank_of(node.args[0]))
    start = start + int(value_of(argument(node, 0, "self")).shape[dim]) if start < 0 else start
    return dim, start, start + length


def _narrow(node: fx.Node, look: Lookup) -> Tokens:
    _, tokens = one_input(node, look)
    dim, start, stop = narrow_bounds(node)
    return tokens.cut(start, stop) if dim == tokens.dim else tokens


def _select_scatter(node: fx.Node, look: Lookup) -> Tokens:
    base, source = look(node.args[0]), look(node.args[1])
    dim = normal_dim(argument(node, 2, "dim"), value_of(node).dim())
    if base is None or source is None or dim == base.dim:
        raise NoRule(node, "it mixes tokens with values that are none, or picks one token")
    if source.at(source.dim + (dim <= source.dim)) != base:
        raise NoRule(node, f"its inputs carry different tokens ({base} and {source})")
    return base


def _pad_sequence(node: fx.Node, look: Lookup) -> Tokens:
    """Sequences put side by side, if they are of one length and hold the same tokens."""
    sequences: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    infos = [look(sequence) for sequence in sequences]
    if infos[0] is None or any(info != infos[0] for info in infos):
        raise NoRule(node, "its inputs carry different tokens")
    return infos[0].at(infos[0].dim + (infos[0].dim > 0 or bool(argument(node, 1, "batch_first", False))))


def _index(node: fx.Node, look: Lookup) -> Tokens:
    """x[..., i, j]: the token axis must lie in front of all that is indexed."""
    _source, tokens = one_input(node, look)
    indices: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    at = [d for d, index in enumerate(indices) if index is not None]
    if not at or tokens.dim >= at[0]:
        raise NoRule(node, "it picks tokens by an index")
    return tokens


def _gather(node: fx.Node, look: Lookup) -> Tokens:
    """gather and scatter along another axis: all inputs have the tokens at the same place, or come from outside."""
    dim = normal_dim(argument(node, 1, "dim"), value_of(node).dim())
    infos = [info for n in node.all_input_nodes if (info := look(n)) is not None]
    tokens = infos[0]
    sizes = {value_of(n).shape[tokens.dim] for n in node.all_input_nodes if value_of(n).dim()}
    if any(info != tokens for info in infos) or dim == tokens.dim or sizes != {tokens.length}:
        raise NoRule(node, "it picks tokens by an index, or its inputs carry different ones")
    return tokens


def _einsum(node: fx.Node, look: Lookup) -> Tokens:
    """The letter of the token axis is in the result; an input from outside that has it is a table, behind the batch."""
    left, _, right = str(node.args[0]).replace(" ", "").partition("->")
    inputs: Sequence[fx.Node] = node.args[1]  # type: ignore[assignment]
    if "." in left + right or not right:
        raise NoRule(node, "an einsum with `...` or without `->` has no rule")
    terms = list(zip(left.split(","), inputs, strict=True))
    first, found = next((letters, info) for letters, source in terms if (info := look(source)) is not None)
    letter = first[found.dim]
    for letters, source in terms:
        info = look(source)
        if info is not None and letters[info.dim] != letter:
            raise NoRule(node, "a product over or between token axes has no rule")
        table = info is None and letter in letters
        if (info is not None and info.segments != found.segments) or (
            table and not _behind_batch(letters, letter, first)
        ):
            raise NoRule(node, "its inputs carry different tokens")
    if letter not in right:
        raise NoRule(node, "a product over or between token axes has no rule")
    return found.at(right.index(letter))


def _behind_batch(letters: str, letter: str, first: str) -> bool:
    """Whether a table has its token axis once, and in front of it what the tokens have in front: the batch."""
    return letters.count(letter) == 1 and letters[0] == first[0] != letter


def letter_axes(node: fx.Node, dim: int) -> list[int | None]:
    """Where an einsum's inputs have the letter of axis `dim` of the result; None where they have not."""
    left, _, right = str(node.args[0]).replace(" ", "").partition("->")
    return [letters.index(right[dim]) if right[dim] in letters else None for letters in left.split(",")]


def _bmm(node: fx.Node, look: Lookup) -> Tokens:
    """Batches of matrices: tokens are rows of the left ones, or number the batch on both sides."""
    left, right = node.args[-2:]
    ours, theirs = look(left), look(right)
    if len(node.args) == 3 and look(node.args[0]) is not None:
        raise NoRule(node, "the token axis comes in through an argument that the rule does not expect")
    if ours is not None and ((ours.dim == 1 and theirs is None) or (ours.dim == 0 and theirs == ours)):
        return ours
    raise NoRule(node, "a product over or between token axes has no rule")


def _addmm(node: fx.Node, look: Lookup) -> Tokens:
    bias, left, right = node.args[:3]
    tokens = look(left)
    if tokens is None or tokens.dim != 0 or look(right) is not None or look(bias) is not None:
        raise NoRule(node, "a product over or between token axes has no rule")
    return tokens


def _point_conv(node: fx.Node, look: Lookup) -> Tokens:
    """A convolution with a kernel of 1 along the token axis, without stride or padding there."""
    source, tokens = one_input(node, look)
    dim, rank = tokens.dim - 2, rank_of(source)
    kernel = value_of(argument(node, 1, "weight")).shape[2:]
    stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
    if dim < 0 or isinstance(padding, str) or rank != len(kernel) + 2:
        raise NoRule(node, "it works along the token axis")
    here = [v[dim % len(v)] if isinstance(v, (list, tuple)) else v for v in (stride, padding)]
    if kernel[dim] != 1 or here != [1, 0]:
        raise NoRule(node, "it works along the token axis")
    return tokens


OTHER_AXES: dict[Any, Callable[[fx.Node, Lookup], Any]] = {
    **dict.fromkeys((aten.flip, aten.roll), along(_dims)),
    **dict.fromkeys((aten.sort, aten.argsort), along(_one_dim(1, -1))),
    aten.topk: along(_one_dim(2, -1)),
    aten.index_select: along(_one_dim(1)),
    aten.repeat_interleave: along(_one_dim(2)),
    aten.pad: along(_padded),
    aten.constant_pad_nd: along(_padded),
    aten.repeat: _repeat,
    aten.narrow: _narrow,
    aten.select_scatter: _select_scatter,
    aten.index: _index,
    aten.pad_sequence: _pad_sequence,
    **dict.fromkeys((aten.gather, aten.scatter), _gather),
    aten.einsum: _einsum,
    **dict.fromkeys((aten.bmm, aten.baddbmm), _bmm),
    aten.addmm: _addmm,
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), _point_conv),
}
