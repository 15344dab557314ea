"""Which branches a cached step must leave to the model, because the model writes in place to what a rewrite would move.

`Functionalize` has done away with all writes that nobody can see. What is left writes to the model's own buffers and inputs,
or to a temporary through a view that has no functional form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.ops import writes

from .memory import Memory
from .tokens import NoRule

__all__ = ["attended", "check_moved", "check_recorded"]


def check_recorded(memory: Memory, values: Iterable[fx.Node]) -> None:
    """Raises NoRule if the model writes to what a full step records: that is recorded at the end, and read before."""
    for value in values:
        if memory.written(value, after=value):
            raise NoRule(value, "the model writes to its memory in place, so that it is not one value")


def check_moved(memory: Memory, body: Sequence[fx.Node], targets: Sequence[fx.Node]) -> None:
    """Raises NoRule if a branch, computed where its result is first read, would read other values than where it is now.

    Gates and tables that the model computes behind that place move in front of it, and so must not be writes, nor read
    anything that is written in between.
    """
    anchor = min(user for target in targets for user in target.users)
    inside, later = set(body), set[fx.Node]()
    todo = [source for node in body for source in node.all_input_nodes if source not in inside]
    while todo:
        node = todo.pop()
        if node.op == "call_function" and node > anchor and node not in later:
            later.add(node)
            todo += node.all_input_nodes
    moved = [*body, *later]
    last = max((anchor, *later))
    for node in moved:
        if writes(node):
            raise NoRule(node, "it writes in place, or is a call that is no operator")
        for value in (node, *node.all_input_nodes):
            if memory.written(value, after=min(body), before=last):
                raise NoRule(
                    node, f"the model writes to the memory of {value.name} in place, within or behind the branch"
                )


def attended(node: fx.Node) -> list[fx.Node]:
    """The queries, keys and values of an attention node."""
    op = ATTENTION[node.target]
    return [n for n in (node.args[i] for i in (op.query, op.key, op.value)) if isinstance(n, fx.Node)]
