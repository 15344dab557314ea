"""Caches that are only ever summed become one.

After the scatters have sunk, a cached step adds many caches to a stream and nothing reads the sums in between: all of
the deep layers (`x + (a0 + w a1) + (b0 + w b1) + ...`), and the shallow ones where caches are behind the gates. Addition is
associative up to rounding, so the sum of the caches is all that need be kept. `find_merges` looks for such sums in all
cached graphs of a model; `MergeCaches` rewrites the cached graphs, which read the state, and the full graph, which writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.ops import argument
from hero_fx.passes.slots import ScalarSlot, slot_of, slots_of

from .summands import Merge, Summand, is_sum, summands

__all__ = ["MergeCaches"]

aten = torch.ops.aten


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
        if not self.merges:
            return 0
        emitter, memory = Emitter(gm), Memory(gm.graph)
        inputs = {slot: node for node, slot in slots_of(gm)}
        sites = 0
        for merge in self.merges:
            if not all(slot in inputs for family in merge.members for slot in family):
                continue
            families = [[inputs[slot] for slot in family] for family in merge.members]
            copies = [[copy for node in family if (copy := _recorded(node)) is not None] for family in families]
            if all(len(copied) == len(family) for copied, family in zip(copies, families, strict=True)):
                _merge_recorded(emitter, memory, merge, families, copies)
            else:
                _merge_read(emitter, merge, families)
            for node in (node for family in families for node in family):
                _drop_readers(gm.graph, node)
                emitter.erase_input(node)
            sites += 1
        return sites


def _merge_read(emitter: Emitter, merge: Merge, families: list[list[fx.Node]]) -> None:
    """In a cached step: the first member's place in the sum is taken by the sum of all; the others' places go."""
    found = summands(emitter.gm)
    for term, slot in enumerate(merge.merged):
        parts = [found[family[term]] for family in merge.members]
        first = families[0][term]
        state = emitter.state(slot, value_of(first))
        writes = [part.write for part in parts if part.write is not None]
        if writes:
            _merge_writes(emitter, state, writes)
        first.replace_all_uses_with(state)
        for part in parts[1:]:
            _drop_from_sum(emitter, part)


def _merge_writes(emitter: Emitter, state: fx.Node, writes: list[fx.Node]) -> None:
    """Rows that are written to the members are summed, and written to the sum."""
    with emitter.before(writes[-1]):
        # Summed as features, then narrowed once: a narrow dtype loses at every sum, and 8-bit floats have none.
        total, *others = (_beneath_cast(argument(write, "source")) for write in writes)
        for rows in others:
            total = emitter.call(aten.add.Tensor, total, rows)
        if value_of(total).dtype != value_of(state).dtype:
            total = emitter.call(aten.to.dtype, total, value_of(state).dtype)
        emitter.call(aten.index_copy_.default, state, *writes[0].args[1:3], total)
    for write in writes:
        emitter.graph.erase_node(write)


def _drop_from_sum(emitter: Emitter, part: Summand) -> None:
    """Takes a member out of its sum, and rows of it out of what is written."""
    (reader,) = part.leaf.users
    (sibling,) = (node for node in reader.all_input_nodes if node is not part.leaf)
    if slot_of(sibling) is not None:  # the sum of all is the sum itself: it must not be the state, which changes
        with emitter.before(reader):
            sibling = emitter.call(aten.clone.default, sibling)
    reader.replace_all_uses_with(sibling)
    emitter.graph.erase_node(reader)
    if part.gather is not None:
        part.gather.taken.replace_all_uses_with(argument(part.gather.taken, "self"))


def _merge_recorded(
    emitter: Emitter, memory: Memory, merge: Merge, families: list[list[fx.Node]], copies: list[list[fx.Node]]
) -> None:
    """In a full step: the sum of what is written to the members is written to the sum."""
    with emitter.before(emitter.output):
        writes: list[tuple[fx.Node, fx.Node]] = []
        for term, slot in enumerate(merge.merged):
            gaps = [_gap(family[term], states[term - 1]) for family, states in zip(copies, families, strict=True)]
            if term and gaps[0] is not None and gaps.count(gaps[0]) == len(gaps):
                state, last = writes[-1]
                change = emitter.call(aten.sub.Tensor, last, emitter.read(state, value_of(last)))
                value = emitter.call(aten.mul.Tensor, change, gaps[0])
            else:
                value = _total(emitter, memory, [argument(family[term], "src") for family in copies])
            writes.append((emitter.state(slot, value_of(families[0][term])), value))
        for state, new in writes:
            emitter.write_back(state, new)
    for copy in (copy for family in copies for copy in family):
        emitter.graph.erase_node(copy)


def _recorded(state: fx.Node) -> fx.Node | None:
    """The `copy_` that a full step writes a state tensor with."""
    return next((user for user in state.users if user.target is aten.copy_.default and user.args[0] is state), None)


def _gap(copy: fx.Node, before: fx.Node) -> fx.Node | None:
    """The 1 / d of a recorded difference to what the state tensor `before` holds; None for anything else."""
    value = argument(copy, "src")
    if value.target is not aten.mul.Tensor:
        return None
    change, gap = value.args
    if not isinstance(change, fx.Node) or change.target is not aten.sub.Tensor or not isinstance(gap, fx.Node):
        return None
    held = argument(change, "other")
    if isinstance(held, fx.Node) and held.target is aten.to.dtype:
        held = argument(held, "self")
    return gap if held is before and isinstance(slot_of(gap), ScalarSlot) else None


def _total(emitter: Emitter, memory: Memory, updates: list[fx.Node]) -> fx.Node:
    """The sum of updates: the difference of the stream behind and in front of them if they follow each other directly.

    That reads the stream at the end of the graph; where the model writes to it in place, the updates are summed.
    """
    adds = [next((u for u in update.users if u.target is aten.add.Tensor), None) for update in updates]
    start = end = None
    for add, update in zip(adds, updates, strict=True):
        if add is None or not is_sum(add):
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


def _beneath_cast(rows: fx.Node) -> fx.Node:
    return rows.all_input_nodes[0] if rows.target is aten.to.dtype else rows


def _drop_readers(graph: fx.Graph, node: fx.Node) -> None:
    """Erases what reads a dropped state tensor; nothing reads that any more."""
    for user in list(node.users):
        _drop_readers(graph, user)
        graph.erase_node(user)
