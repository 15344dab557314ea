"""State tensors whose values are used for nothing but one sum, and the merges that this allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import argument
from hero_fx.passes.slots import FeatureSlot, ScalarSlot, StateSlot, slot_of, slots_of

from .scatters import is_selection

__all__ = ["Merge", "Summand", "find_merges", "is_sum", "summands"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Merge:
    """Families of state (Y_0 .. Y_{terms-1}, as `members[i]`) whose sums take their places as `merged`."""

    merged: tuple[FeatureSlot, ...]
    members: tuple[tuple[FeatureSlot, ...], ...]


def find_merges(cached: Sequence[fx.GraphModule], families: Sequence[tuple[FeatureSlot, ...]]) -> tuple[Merge, ...]:
    """The merges that are legal in every cached graph.

    Args:
        cached: the graphs of all cached-step kinds.
        families: per cached feature its state slots Y_0, Y_1, ...; a family is merged whole or not at all.
    """
    found: dict[tuple[object, ...], list[tuple[FeatureSlot, ...]]] = {}
    sums = [summands(gm) for gm in cached]
    for family in families:
        uses = tuple(_use(known, family) for known in sums)
        if all(use is not None for use in uses):
            found.setdefault(uses, []).append(family)
    return tuple(
        Merge(tuple(replace(first, merged=True) for first in members[0]), tuple(members))
        for members in found.values()
        if len(members) > 1
    )


def _use(sums: Mapping[StateSlot, Summand], family: tuple[FeatureSlot, ...]) -> object:
    """What one graph does with a family, equal for those that it does the same with; None if it cannot be merged there."""
    terms = [sums[slot] for slot in family if slot in sums]
    gathers = [term.gather for term in terms if term.gather is not None]
    if len(terms) < len(family) or len({term.root for term in terms}) > 1:
        return None
    if any(gather.into != family[0] for gather in gathers):
        return None
    how = tuple((term.weight, term.rows, term.shape, term.dtype) for term in terms)
    return terms[0].root, how, tuple(gather.where for gather in gathers)


@dataclass(frozen=True, slots=True)
class Gather:
    """Rows of Y_1 that are taken off the fresh rows on their way into Y_0, so that the estimate at this x is fresh."""

    where: tuple[int, str, ScalarSlot]
    """(axis, index, scalar): the rows gathered and what they are multiplied with."""
    into: StateSlot
    taken: fx.Node
    """fresh - x Y_1[idx]."""


@dataclass(frozen=True, slots=True)
class Summand:
    """How a state tensor takes part in a sum: `root` is the whole sum, `weight` the scalar it is multiplied with."""

    root: str
    weight: ScalarSlot | None
    rows: tuple[int, str] | None
    """(axis, index) of the rows of it that are written; None if none are."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    leaf: fx.Node
    write: fx.Node | None
    gather: Gather | None


def summands(gm: fx.GraphModule) -> dict[StateSlot, Summand]:
    """The state tensors whose value is used for nothing but one sum (and whose rows may be written at the end)."""
    result: dict[StateSlot, Summand] = {}
    roots: dict[fx.Node, fx.Node] = {}
    for node, slot in slots_of(gm):
        if isinstance(slot, StateSlot) and (summand := _summand(node, roots)) is not None:
            result[slot] = summand
    return result


def _summand(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> Summand | None:
    """How a state tensor takes part in a sum; `roots` as for `_root`."""
    writes = [user for user in node.users if user.target is aten.index_copy_.default and user.args[0] is node]
    leaf = node
    weight: ScalarSlot | None = None
    readers = [user for user in node.users if user not in writes]
    if len(readers) == 1 and readers[0].target is aten.to.dtype:
        leaf, readers = readers[0], list(readers[0].users)
    gathers = [gather for reader in readers if (gather := _gather(reader)) is not None]
    readers = [reader for reader in readers if _gather(reader) is None]
    if len(readers) != 1 or len(gathers) > 1 or len(writes) > 1 or (writes and writes[0].users):
        return None
    (reader,) = readers
    # A reader behind the write sees fresh rows; the merged write comes behind all readers.
    if writes and writes[0] < reader:
        return None
    if reader.target is aten.mul.Tensor and len(reader.users) == 1:
        scalar = slot_of(next((a for a in reader.args if a is not leaf), None))
        if not isinstance(scalar, ScalarSlot):
            return None
        weight = scalar
        leaf, reader = reader, next(iter(reader.users))
    # The same tensor on both sides (x + x) would be dropped once and counted twice.
    if not is_sum(reader) or reader.args[0] is reader.args[1]:
        return None
    return Summand(
        root=_root(reader, roots).name,
        weight=weight,
        rows=(argument(writes[0], "dim"), str(argument(writes[0], "index"))) if writes else None,
        shape=tuple(value_of(node).shape),
        dtype=value_of(node).dtype,
        leaf=leaf,
        write=writes[0] if writes else None,
        gather=gathers[0] if gathers else None,
    )


def _gather(reader: fx.Node) -> Gather | None:
    """The chain index_select -> * scalar -> fresh - . -> rows of a state tensor, if nothing else reads a part of it."""
    if reader.target is not aten.index_select.default or not is_selection(reader.args[2]):
        return None
    chain = [reader]
    while len(chain[-1].users) == 1 and chain[-1].target is not aten.index_copy_.default:
        chain.append(next(iter(chain[-1].users)))
    targets = [node.target for node in chain if node.target is not aten.to.dtype]
    if targets != [aten.index_select.default, aten.mul.Tensor, aten.sub.Tensor, aten.index_copy_.default]:
        return None
    scaled, taken, write = chain[1], chain[2], chain[-1]
    if taken.args[1] is not scaled or taken.kwargs or write.users or write.args[3] is not chain[-2]:
        return None
    scalar, slot = slot_of(scaled.args[1]), slot_of(write.args[0])
    if not isinstance(scalar, ScalarSlot) or not isinstance(slot, StateSlot):
        return None
    return Gather((argument(reader, "dim"), str(argument(reader, "index")), scalar), slot, taken)


def is_sum(node: fx.Node) -> bool:
    """An `add` of two tensors of its own shape and dtype."""
    return (
        node.target is aten.add.Tensor
        and not node.kwargs
        and all(
            isinstance(a, fx.Node)
            and value_of(a).shape == value_of(node).shape
            and value_of(a).dtype == value_of(node).dtype
            for a in node.args
        )
    )


def _root(node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """The last sum of a tree of sums in which nothing else reads the sums in between; `known` holds those found so far."""
    path = [node]
    while path[-1] not in known and len(path[-1].users) == 1 and is_sum(user := next(iter(path[-1].users))):
        path.append(user)
    root = known.get(path[-1], path[-1])
    known.update(dict.fromkeys(path, root))
    return root
