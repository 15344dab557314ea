"""The token axis through one branch, from the streams it reads to what is cached of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import fx

from hero_fx.passes.attention import ATTENTION

from .follow import follow
from .structure import Branch, Structure
from .tokens import Info, NoRule, Source, Tokens

__all__ = ["BranchTokens", "below", "body_of", "check_whole", "follow_branch"]

N = TypeVar("N", bound=Hashable)
M = TypeVar("M", bound=Hashable)


@dataclass(frozen=True, slots=True)
class BranchTokens(Generic[N]):
    """Where the tokens are in one branch.

    A plan holds it by the names of nodes: it is made once, and every step graph is a copy with the same names. A pass
    turns names into the nodes of its graph with `over`.
    """

    sources: tuple[N, ...]
    """Stream values that the branch reads."""
    body: tuple[N, ...]
    """What lies between, in order, with the targets."""
    targets: tuple[N, ...]
    """What is cached: features, or gated updates."""
    infos: Mapping[N, Info]
    """Of the sources and the body."""

    def of(self, node: N) -> Tokens:
        """The tokens of a source or target."""
        tokens = self.infos[node]
        assert isinstance(tokens, Tokens)
        return tokens

    def over(self, names: Callable[[N], M]) -> BranchTokens[M]:
        """The same for nodes that are called otherwise."""
        sources, body, targets = (tuple(map(names, nodes)) for nodes in (self.sources, self.body, self.targets))
        return BranchTokens(sources, body, targets, {names(node): info for node, info in self.infos.items()})


def follow_branch(
    nodes: Mapping[str, fx.Node], structure: Structure, branch: Branch, *, to_update: bool
) -> BranchTokens[fx.Node]:
    """Follows the token axis through a branch; `nodes` are the graph's by name, `to_update` as in `body_of`.

    Raises:
        NoRule: the branch cannot be computed for a part of its tokens.
    """
    sources, body, targets = body_of(nodes, branch, to_update=to_update)
    seeds = {node: structure.streams[stream].tokens for node, (_, stream) in zip(sources, branch.reads, strict=True)}
    if any(_only_masks(node, body, targets) for node in sources):
        sources = [node for node in sources if not _only_masks(node, body, targets)]
        seeds, body = {node: seeds[node] for node in sources}, _moved(sources, body)
    infos = follow(body, seeds, whole=structure.lengths.keys() - {structure.image})
    check_whole(infos, structure.lengths)
    for target, update in zip(targets, branch.updates, strict=True):
        if infos.get(target) != structure.streams[update.stream].tokens:
            raise NoRule(target, "its tokens are not those of the stream it is added to")
    return BranchTokens(tuple(sources), tuple(body), tuple(targets), infos)


def body_of(
    nodes: Mapping[str, fx.Node], branch: Branch, *, to_update: bool
) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """(sources, body, targets) of a branch in a graph: its targets are the updates, or the features before their gates.

    `nodes` are the graph's by name.
    """
    sources = [nodes[name] for name, _ in branch.reads]
    targets = [nodes[u.update if to_update else u.feature] for u in branch.updates]
    return sources, below(sources, targets), targets


def below(sources: Sequence[fx.Node], targets: Sequence[fx.Node]) -> list[fx.Node]:
    """What the targets are computed from and the sources change, in order."""
    # Only what lies above the targets and below the stream values is looked at: the cost does not grow with depth.
    above, todo = set(targets), list(targets)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in above and source not in sources:
                above.add(source)
                todo.append(source)
    return _moved(sources, sorted(above))


def _moved(sources: Iterable[fx.Node], body: Iterable[fx.Node]) -> list[fx.Node]:
    """Of nodes in order, those that depend on a source."""
    moved = set(sources)
    found = []
    for node in body:
        if not moved.isdisjoint(node.all_input_nodes):
            moved.add(node)
            found.append(node)
    return found


def _only_masks(source: fx.Node, body: Sequence[fx.Node], targets: Sequence[fx.Node]) -> bool:
    """Whether a stream's value goes into nothing but masks of attention: those are tables for whole tokens, as any others."""
    moved = {source}
    for node in body:
        if moved.isdisjoint(node.all_input_nodes):
            continue
        op = ATTENTION.get(node.target)
        if op is None or any(node.args[i] in moved for i in (op.query, op.key, op.value)):
            moved.add(node)
    return moved.isdisjoint(targets)


def check_whole(infos: Mapping[fx.Node, Info], lengths: Mapping[Source, int]) -> None:
    """Raises NoRule if some node holds only a part of a token source: rows of a part are not known statically."""
    for node, info in infos.items():
        for tokens in info if isinstance(info, tuple) else (info,):
            for segment in tokens.segments if tokens is not None else ():
                if segment.source in lengths and segment.length != lengths[segment.source]:
                    raise NoRule(node, f"it holds a part of the tokens of one source ({segment})")
