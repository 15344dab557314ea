"""Caches that are only ever summed become one.

After the scatters have sunk, a cached step adds many caches to a stream and nothing reads the sums in between: all of
the deep layers (`x + (a0 + w a1) + (b0 + w b1) + ...`), and the shallow ones where caches are behind the gates. Addition is
associative up to rounding, so the sum of the caches is all that need be kept. `find_merges` looks for such sums in all
cached graphs of a model; `MergeCaches` rewrites the cached graphs, which read the state, and the full graph, which writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.slots import ScalarSlot, StateSlot

from .scatters import is_selection

__all__ = ["Merge", "MergeCaches", "find_merges"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Merge:
    """Families of state (Y_0 .. Y_{terms-1}, as `members[i]`) whose sums take their places as `merged`."""

    merged: tuple[StateSlot, ...]
    members: tuple[tuple[StateSlot, ...], ...]


def find_merges(cached: Sequence[fx.GraphModule], families: Sequence[tuple[StateSlot, ...]]) -> tuple[Merge, ...]:
    """The merges that are legal in every cached graph.

    Args:
        cached: the graphs of all cached-step kinds.
        families: per cached feature its state slots Y_0, Y_1, ...; a family is merged whole or not at all.
    """
    groups: list[dict[tuple[StateSlot, ...], object]] = []
    for gm in cached:
        sums = _summands(gm)
        keys: dict[tuple[StateSlot, ...], object] = {}
        for family in families:
            where = [sums.get(slot) for slot in family]
            if any(w is None for w in where):
                continue
            roots = {w.root for w in where if w is not None}
            weights = tuple(w.weight for w in where if w is not None)
            writes = tuple(w.rows for w in where if w is not None)
            likes = tuple((w.shape, w.dtype) for w in where if w is not None)
            gathers = [w.gather for w in where if w is not None and w.gather is not None]
            if len(roots) == 1 and all(gather.into == family[0] for gather in gathers):
                keys[family] = (roots.pop(), weights, writes, likes, tuple(gather.where for gather in gathers))
        groups.append(keys)
    found: dict[tuple[object, ...], list[tuple[StateSlot, ...]]] = {}
    for family in families:
        if all(family in keys for keys in groups):
            found.setdefault(tuple(keys[family] for keys in groups), []).append(family)
    return tuple(
        Merge(tuple(StateSlot(f"sum_{first.name}", ("sum", first)) for first in members[0]), tuple(members))
        for members in found.values()
        if len(members) > 1
    )


@dataclass(frozen=True, slots=True)
class _Gather:
    """Rows of Y_1 that are taken off the fresh rows on their way into Y_0, so that the estimate at this x is fresh."""

    where: tuple[str, ...]
    """(axis, index, scalar): the rows gathered and what they are multiplied with."""
    into: StateSlot
    taken: fx.Node
    """fresh - x Y_1[idx]."""


@dataclass(frozen=True, slots=True)
class _Summand:
    """How a state tensor takes part in a sum: `root` is the whole sum, `weight` the scalar it is multiplied with."""

    root: str
    weight: str | None
    rows: tuple[int, str] | None
    """(axis, index) of the rows of it that are written; None if none are."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    leaf: fx.Node
    write: fx.Node | None
    gather: _Gather | None


def _summands(gm: fx.GraphModule) -> dict[StateSlot, _Summand]:
    """The state tensors whose value is used for nothing but one sum (and whose rows may be written at the end)."""
    result = {}
    roots: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        slot = node.meta.get("slot")
        if not isinstance(slot, StateSlot):
            continue
        writes = [user for user in node.users if user.target is aten.index_copy_.default and user.args[0] is node]
        leaf, weight = node, None
        readers = [user for user in node.users if user not in writes]
        if len(readers) == 1 and readers[0].target is aten.to.dtype:
            leaf, readers = readers[0], list(readers[0].users)
        gathers = [gather for reader in readers if (gather := _gather(reader)) is not None]
        readers = [reader for reader in readers if _gather(reader) is None]
        if len(readers) != 1 or len(gathers) > 1 or len(writes) > 1 or (writes and writes[0].users):
            continue
        # A reader behind the write sees fresh rows; the merged write comes behind all readers.
        if writes and writes[0] < readers[0]:
            continue
        reader = readers[0]
        if reader.target is aten.mul.Tensor and len(reader.users) == 1:
            factor = next((a for a in reader.args if a is not leaf), None)
            scalar = factor.meta.get("slot") if isinstance(factor, fx.Node) else None
            if not isinstance(scalar, ScalarSlot):
                continue
            weight, leaf, reader = scalar.name, reader, next(iter(reader.users))
        if not _is_sum(reader):
            continue
        # The same tensor on both sides (x + x) would be dropped once and counted twice.
        if reader.args[0] is reader.args[1]:
            continue
        rows = None
        if writes:
            _, dim, index, _ = writes[0].args
            assert isinstance(dim, int)
            rows = (dim, str(index))
        value = value_of(node)
        result[slot] = _Summand(
            root=_root(reader, roots).name,
            weight=weight,
            rows=rows,
            shape=tuple(value.shape),
            dtype=value.dtype,
            leaf=leaf,
            write=writes[0] if writes else None,
            gather=gathers[0] if gathers else None,
        )
    return result


def _gather(reader: fx.Node) -> _Gather | None:
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
    factor, state = scaled.args[1], write.args[0]
    if taken.args[1] is not scaled or taken.kwargs or not isinstance(factor, fx.Node) or write.users:
        return None
    assert isinstance(state, fx.Node)
    scalar, slot = factor.meta.get("slot"), state.meta.get("slot")
    if not isinstance(scalar, ScalarSlot) or not isinstance(slot, StateSlot) or write.args[3] is not chain[-2]:
        return None
    return _Gather((str(reader.args[1]), str(reader.args[2]), scalar.name), slot, taken)


def _is_sum(node: fx.Node) -> bool:
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
    while path[-1] not in known and len(path[-1].users) == 1 and _is_sum(user := next(iter(path[-1].users))):
        path.append(user)
    root = known.get(path[-1], path[-1])
    known.update(dict.fromkeys(path, root))
    return root


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeCaches:
    """Keeps the sum of caches that are only ever summed.

    Before, in a cached step::

        add = aten.add.Tensor(x, a)  # a, b: feature state of two branches
        add_1 = aten.add.Tensor(add, b)

    After::

        add_1 = aten.add.Tensor(x, sum_a)

    Before, in a full step (u, v are the branches' updates of the stream)::

        add = aten.add.Tensor(x, u)
        add_1 = aten.add.Tensor(add, v)
        copy_ = aten.copy_.default(a, u)
        copy__1 = aten.copy_.default(b, v)

    After::

        sub = aten.sub.Tensor(add_1, x)  # u + v, already summed by the stream itself
        copy_ = aten.copy_.default(sum_a, sub)

    Legal because `find_merges` has seen that every cached graph reads the members only in one and the same sum, with one
    and the same weight, and writes the same rows of them. That needs caches behind the gates: a live gate g(t) between
    cache and sum differs from branch to branch. Differences (Y_1, ...) are linear, so those of the sum are their sums, and
    so are the rows that an extrapolated refresh takes off what it writes (`fresh - x Y_1[idx]`).
    """

    merges: tuple[Merge, ...]
    name: str = "merge_caches"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, memory = Emitter(gm), Memory(gm.graph)
        inputs = {n.meta.get("slot"): n for n in gm.graph.find_nodes(op="placeholder") if "slot" in n.meta}
        sites = 0
        for merge in self.merges:
            members = [[inputs.get(slot) for slot in family] for family in merge.members]
            if any(node is None for family in members for node in family):
                continue
            families = [[node for node in family if node is not None] for family in members]
            if all(_recorded(node) is not None for family in families for node in family):
                self._full(emitter, memory, merge, families)
            else:
                self._cached(emitter, gm, merge)
            for family in families:
                for node in family:
                    _drop_readers(gm.graph, node)
                    emitter.erase_input(node)
            sites += 1
        return sites

    @staticmethod
    def _cached(emitter: Emitter, gm: fx.GraphModule, merge: Merge) -> None:
        summands = _summands(gm)
        for term, slot in enumerate(merge.merged):
            parts = [summands[family[term]] for family in merge.members]
            inputs = {n.meta["slot"]: n for n in gm.graph.find_nodes(op="placeholder") if "slot" in n.meta}
            first = inputs[merge.members[0][term]]
            state = emitter.state(slot, value_of(first))
            # The first member's place in the sum is taken by the sum of all; the others' places go.
            writes = [part.write for part in parts if part.write is not None]
            if writes:
                with emitter.before(writes[-1]):
                    # Summed as features, then narrowed once: a narrow dtype loses at every sum, and 8-bit floats have none.
                    total, *others = (_beneath_cast(write.args[3]) for write in writes)
                    for rows in others:
                        total = emitter.call(aten.add.Tensor, total, rows)
                    if value_of(total).dtype != value_of(state).dtype:
                        total = emitter.call(aten.to.dtype, total, value_of(state).dtype)
                    emitter.call(aten.index_copy_.default, state, *writes[0].args[1:3], total)
                for write in writes:
                    gm.graph.erase_node(write)
            first.replace_all_uses_with(state)
            for part in parts[1:]:
                (reader,) = part.leaf.users
                sibling = reader.args[1] if reader.args[0] is part.leaf else reader.args[0]
                assert isinstance(sibling, fx.Node)
                if "slot" in sibling.meta:  # the sum of all is the sum itself: it must not be the state, which changes
                    with emitter.before(reader):
                        sibling = emitter.call(aten.clone.default, sibling)
                reader.replace_all_uses_with(sibling)
                gm.graph.erase_node(reader)
                if part.gather is not None:
                    fresh = part.gather.taken.args[0]
                    assert isinstance(fresh, fx.Node)
                    part.gather.taken.replace_all_uses_with(fresh)

    @staticmethod
    def _full(emitter: Emitter, memory: Memory, merge: Merge, families: list[list[fx.Node]]) -> None:
        copies = [[_recorded(node) for node in family] for family in families]
        with emitter.before(emitter.output):
            writes: list[tuple[fx.Node, fx.Node]] = []
            for term, slot in enumerate(merge.merged):
                gaps = [_gap(family[term], states[term - 1]) for family, states in zip(copies, families, strict=True)]
                if term and gaps[0] is not None and gaps.count(gaps[0]) == len(gaps):
                    state, last = writes[-1]
                    change = emitter.call(aten.sub.Tensor, last, emitter.read(state, value_of(last)))
                    value = emitter.call(aten.mul.Tensor, change, gaps[0])
                else:
                    recorded = [family[term].args[1] for family in copies]  # type: ignore[union-attr]
                    value = _total(emitter, memory, [node for node in recorded if isinstance(node, fx.Node)])
                writes.append((emitter.state(slot, value_of(families[0][term])), value))
            for state, new in writes:
                emitter.write_back(state, new)
        for family in copies:
            for copy in family:
                assert copy is not None
                emitter.graph.erase_node(copy)


def _recorded(state: fx.Node) -> fx.Node | None:
    """The `copy_` that a full step writes a state tensor with."""
    return next((user for user in state.users if user.target is aten.copy_.default and user.args[0] is state), None)


def _gap(copy: fx.Node | None, before: fx.Node) -> fx.Node | None:
    """The 1 / d of a recorded difference to what the state tensor `before` holds; None for anything else."""
    assert copy is not None
    value = copy.args[1]
    if not isinstance(value, fx.Node) or value.target is not aten.mul.Tensor:
        return None
    change, gap = value.args
    if not isinstance(change, fx.Node) or change.target is not aten.sub.Tensor:
        return None
    held = change.args[1]
    if isinstance(held, fx.Node) and held.target is aten.to.dtype:
        held = held.args[0]
    is_gap = isinstance(gap, fx.Node) and isinstance(gap.meta.get("slot"), ScalarSlot)
    return gap if is_gap and held is before else None  # type: ignore[return-value]


def _total(emitter: Emitter, memory: Memory, updates: list[fx.Node]) -> fx.Node:
    """The sum of updates: the difference of the stream behind and in front of them if they follow each other directly.

    That reads the stream at the end of the graph; where the model writes to it in place, the updates are summed.
    """
    adds = [next((u for u in update.users if u.target is aten.add.Tensor), None) for update in updates]
    start = end = None
    for add, update in zip(adds, updates, strict=True):
        if add is None or not _is_sum(add):
            break
        residual = add.args[0] if add.args[1] is update else add.args[1]
        if end is not None and residual is not end:
            break
        if any(isinstance(n, fx.Node) and memory.written(n, after=update) for n in (add, residual)):
            break
        start, end = (residual if start is None else start), add
    else:
        return emitter.call(aten.sub.Tensor, end, start)
    total = updates[0]
    for update in updates[1:]:
        total = emitter.call(aten.add.Tensor, total, update)
    return total


def _beneath_cast(node: Any) -> fx.Node:
    rows = node.args[0] if node.target is aten.to.dtype else node
    assert isinstance(rows, fx.Node)
    return rows


def _drop_readers(graph: fx.Graph, node: fx.Node) -> None:
    """Erases what reads a dropped state tensor; nothing reads that any more."""
    for user in list(node.users):
        _drop_readers(graph, user)
        graph.erase_node(user)
