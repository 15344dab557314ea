"""Finding the attention and FFN branches of each layer, from the graph's structure alone.

A transformer updates a residual stream by `x = x + f(norm(x))`, often `x + gate * f(norm(x))`. In the graph that is an
`add` whose one operand (the update) depends on the other (the residual) through a matrix product. Updates whose
computations share a matrix product belong to one branch: joint attention updates the image and the text stream. A
branch is attention if an attention op is inside, and FFN if not. No module or class name is looked at; `nn_module_stack`
only gives branches names for people.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from .emit import value_of
from .tokens import ATTENTION, Info, NoRule, Segment, Tokens, follow, is_matmul

__all__ = ["Branch", "Stream", "Structure", "Update", "body_of", "find_branches", "find_grid"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Update:
    """One residual update `add = residual + update` of a stream, `update = gate * feature`; all are node names."""

    stream: int
    add: str
    residual: str
    source: str
    """The stream's value that the branch reads (the residual itself, or an earlier one in parallel branches)."""
    update: str
    feature: str
    """The branch's output before its gate; the update itself where there is no gate."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch: what lies between the values it reads and the updates it gives."""

    layer: int
    kind: str
    """`attention`, `cross_attention`, `ffn`, or `parallel` (attention and FFN summed by one projection)."""
    label: str
    """Unique and short: `l0_attention`."""
    module: str
    """The module path that people know it by; empty if the graph does not say."""
    updates: tuple[Update, ...]
    reads: tuple[tuple[str, int], ...]
    """(node, stream) of every stream value it computes from; more than its updates' where it only reads a stream."""
    attention: tuple[str, ...]
    """Its attention nodes."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A residual stream: hidden states [B, tokens, width] that the branches add to."""

    name: str
    root: str
    """The node with its value in front of the first layer."""
    tokens: Tokens
    width: int


@dataclass(frozen=True, slots=True)
class Structure:
    """What was found in a normalised graph; all nodes by name, so that it holds for copies of the graph too."""

    branches: tuple[Branch, ...]
    streams: tuple[Stream, ...]
    image: str | None
    """The token source that holds the image (video) tokens: the longest one that reaches the output."""
    image_tokens: int
    grid: tuple[int, int, int] | None
    """(frames, height, width) of the image tokens, where the graph shows it."""

    @property
    def depth(self) -> int:
        return self.branches[-1].layer + 1 if self.branches else 0

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of each source."""
        lengths: dict[str, int] = {}
        for segment in (s for stream in self.streams for s in stream.tokens.segments):
            lengths[segment.source] = max(segment.stop, lengths.get(segment.source, 0))
        return lengths


class _Graph:
    """A graph with fast ancestor queries: `above[i]` is the bit set of the nodes that node i depends on."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.above: list[int] = []
        for node in self.nodes:
            bits = 0
            for source in node.all_input_nodes:
                i = self.index[source]
                bits |= self.above[i] | 1 << i
            self.above.append(bits)

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        return bool(self.above[self.index[node]] >> self.index[source] & 1)

    def between(self, sources: Iterable[fx.Node], targets: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes on a path from a source to a target, in order, with the targets and without the sources."""
        source_bits = 0
        for source in sources:
            source_bits |= 1 << self.index[source]
        wanted, first = 0, source_bits & -source_bits
        for target in targets:
            i = self.index[target]
            wanted |= self.above[i] | 1 << i
        wanted &= ~((first << 1) - 1) & ~source_bits
        result = []
        while wanted:
            i = (wanted & -wanted).bit_length() - 1
            wanted &= wanted - 1
            if self.above[i] & source_bits:
                result.append(self.nodes[i])
        return result


def body_of(
    gm: fx.GraphModule, branch: Branch, *, to_update: bool
) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """(sources, body, targets) of a branch in `gm`: its targets are the updates, or the features before their gates."""
    by_name = {node.name: node for node in gm.graph.nodes}
    sources = [by_name[name] for name, _ in branch.reads]
    targets = [by_name[u.update if to_update else u.feature] for u in branch.updates]
    # Only what lies above the targets and below the stream values is looked at: the cost does not grow with depth.
    above, todo = set(targets), list(targets)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in above and source not in sources:
                above.add(source)
                todo.append(source)
    moved = set(sources)
    body = []
    for node in sorted(above):
        if not moved.isdisjoint(node.all_input_nodes):
            moved.add(node)
            body.append(node)
    return sources, body, targets


def _is_cast(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (
        aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten.clone.default,
        aten.contiguous.default, aten.detach.default, aten.dropout.default, aten._to_copy.default,
    )  # fmt: skip


def _strip(node: fx.Node) -> fx.Node:
    """The node beneath casts and copies."""
    while _is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


@dataclass(slots=True)
class _Found:
    add: fx.Node
    residual: fx.Node
    source: fx.Node
    update: fx.Node
    matmuls: frozenset[fx.Node]
    stream: int = -1


def _residual_adds(graph: _Graph) -> list[_Found]:
    """Every `add(x, f(x))` in which f holds a matrix product and which keeps x's shape, in order."""
    found: dict[fx.Node, _Found] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
            continue
        a, b = node.args[:2]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            continue
        shape = value_of(node).shape
        if len(shape) < 3 or value_of(a).shape != shape or value_of(b).shape != shape:
            continue
        for residual, update in ((a, b), (b, a)):
            match = _source_of(graph, found, residual, update)
            if match is not None:
                found[node] = _Found(node, _strip(residual), match[0], update, match[1])
                break
    return list(found.values())


def _source_of(
    graph: _Graph, found: dict[fx.Node, _Found], residual: fx.Node, update: fx.Node
) -> tuple[fx.Node, frozenset[fx.Node]] | None:
    """The value of the residual's stream that `update` reads, and the matrix products in between."""
    value = _strip(residual)
    # x + attention(x) + ffn(x) is two adds; the second one's update reads the stream one add earlier.
    for _ in range(4):
        if graph.depends(update, value):
            matmuls = frozenset(n for n in graph.between([value], [update]) if is_matmul(n))
            return (value, matmuls) if matmuls else None
        if value not in found:
            return None
        value = found[value].residual
    return None


def _feature(graph: _Graph, update: fx.Node, sources: Sequence[fx.Node]) -> fx.Node:
    """What a chain of gates (factors that do not depend on the streams) is multiplied with."""

    def moves(node: object) -> bool:
        return isinstance(node, fx.Node) and any(graph.depends(node, s) or node is s for s in sources)

    feature, node = update, update
    while node.op == "call_function":
        if node.target is aten.mul.Tensor and moves(node.args[0]) != moves(node.args[1]):
            node = node.args[0] if moves(node.args[0]) else node.args[1]  # type: ignore[assignment]
            feature = node
        elif _is_cast(node):
            node = node.args[0]  # type: ignore[assignment]
        else:
            break
    return feature


def find_branches(gm: fx.GraphModule) -> Structure:
    """The residual branches of a normalised graph, layer by layer; a structure without branches if there are none."""
    graph = _Graph(gm.graph)
    adds = _residual_adds(graph)
    if not adds:
        return Structure((), (), None, 0, None)
    streams = _streams(graph, adds)
    by_stream = {found.add: found.stream for found in adds}
    values = by_stream | {found.residual: found.stream for found in adds}
    branches: list[Branch] = []
    layer, seen_self_attention = -1, False
    for group in _groups(adds):
        sources = list(dict.fromkeys(f.source for f in group))
        body = graph.between(sources, [f.update for f in group])
        attention = [n for n in body if n.target in ATTENTION]
        kind = _kind(graph, body, attention, sources, [f.update for f in group])
        starts = kind in ("attention", "parallel")
        if layer < 0 or (starts and seen_self_attention):
            layer, seen_self_attention = layer + 1, False
        seen_self_attention |= starts
        label = f"l{layer}_{kind}"
        if any(b.label == label for b in branches[-8:]):
            label = f"{label}_{sum(b.layer == layer for b in branches)}"
        updates = tuple(
            Update(
                stream=by_stream[f.add],
                add=f.add.name,
                residual=f.residual.name,
                source=f.source.name,
                update=f.update.name,
                feature=_feature(graph, f.update, sources).name,
            )
            for f in group
        )
        branches.append(
            Branch(
                layer,
                kind,
                label,
                _module_path(body),
                updates,
                tuple((n.name, values[n]) for n in _reads([f.update for f in group], values)),
                tuple(n.name for n in attention),
            )
        )
    image, count = _image(graph, adds, streams)
    return Structure(tuple(branches), tuple(streams), image, count, find_grid(gm, count))


def _groups(adds: list[_Found]) -> list[list[_Found]]:
    """Updates that share a matrix product, in order of their first add."""
    groups: list[tuple[set[fx.Node], list[_Found]]] = []
    for found in adds:
        for matmuls, members in reversed(groups[-6:]):
            if matmuls & found.matmuls:
                matmuls |= found.matmuls
                members.append(found)
                break
        else:
            groups.append((set(found.matmuls), [found]))
    return [members for _, members in groups]


def _reads(targets: list[fx.Node], values: dict[fx.Node, int]) -> list[fx.Node]:
    """The stream values met first on the way up from the targets."""
    met: dict[fx.Node, None] = {}
    seen, todo = set(targets), list(targets)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in values:
                met[source] = None
            elif source not in seen:
                seen.add(source)
                todo.append(source)
    return list(met)


def _kind(
    graph: _Graph,
    body: list[fx.Node],
    attention: list[fx.Node],
    sources: list[fx.Node],
    updates: list[fx.Node],
) -> str:
    if not attention:
        return "ffn"
    key = attention[0].args[ATTENTION[attention[0].target].key]
    assert isinstance(key, fx.Node)
    if not any(graph.depends(key, s) for s in sources):
        return "cross_attention"
    # A product that neither feeds attention nor reads it is an FFN beside it.
    for node in body:
        if (
            node not in attention
            and is_matmul(node)
            and not any(graph.depends(a, node) or graph.depends(node, a) for a in attention)
        ):
            return "parallel"
    return "attention"


def _streams(graph: _Graph, adds: list[_Found]) -> list[Stream]:
    """The residual streams; sets `stream` on each update. Tokens flow from one stream into the next through cat."""
    owner: dict[fx.Node, int] = {}
    streams: list[Stream] = []
    known: dict[fx.Node, Info] = {}
    for found in adds:
        stream = owner.get(found.residual)
        if stream is None:
            root = found.residual
            tokens = _root_tokens(root, len(streams), known)
            # A stream that is taken apart and put together again in the same order is still that stream.
            stream = next((i for i, s in enumerate(streams) if s.tokens == tokens), len(streams))
            if stream == len(streams):
                streams.append(Stream(f"s{stream}", root.name, tokens, value_of(root).shape[-1]))
            known[root] = tokens
            owner[root] = stream
        found.stream = stream
        owner[found.add] = stream
        known[found.add] = streams[stream].tokens
    return _named(graph, adds, streams)


def _root_tokens(root: fx.Node, stream: int, known: dict[fx.Node, Info]) -> Tokens:
    """The tokens of a new stream: those of earlier streams it is made of, or its own, or those of the parts of a cat."""
    try:
        followed = follow(_between_streams(root, known), known)
    except NoRule:
        followed = {}
    tokens = followed.get(root)
    if isinstance(tokens, Tokens) and tokens.dim == 1:
        return tokens
    if root.target is aten.cat.default and len(root.args) > 1 and root.args[1] in (1, -2):
        parts: list[fx.Node] = root.args[0]  # type: ignore[assignment]
        return Tokens(
            1,
            tuple(Segment(f"s{stream}.{i}", 0, int(value_of(p).shape[1])) for i, p in enumerate(parts)),
        )
    return Tokens(1, (Segment(f"s{stream}", 0, int(value_of(root).shape[1])),))


def _between_streams(root: fx.Node, known: dict[fx.Node, Info]) -> list[fx.Node]:
    """The few nodes (casts, cat, slice) between known stream values and a new root, in order."""
    path: list[fx.Node] = []
    todo = [root]
    while todo and len(path) < 32:
        node = todo.pop()
        if node in known or node.op != "call_function" or is_matmul(node):
            continue
        path.append(node)
        todo.extend(node.all_input_nodes)
    order = {n: i for i, n in enumerate(root.graph.nodes)} if path else {}
    return sorted(path, key=order.__getitem__)


def _image(graph: _Graph, adds: list[_Found], streams: list[Stream]) -> tuple[str | None, int]:
    """The token source that the output is made of; the longest one if there are several.

    Followed from the streams' last values: in joint blocks the text stream's last value still feeds the last FFN, but none
    of its tokens come out of it.
    """
    last = {found.stream: found.add for found in adds}
    known: dict[fx.Node, Info] = {}
    for found in adds:
        known[found.residual] = known[found.add] = streams[found.stream].tokens
    start = min(graph.index[add] for add in last.values())
    for node in graph.nodes[start:]:
        with suppress(NoRule):  # unpatchify takes the token axis apart
            known = follow([node], known)
    leaving = [
        segment
        for node in graph.nodes[start:]
        if isinstance(info := known.get(node), Tokens) and any(user not in known for user in node.users)
        for segment in info.segments
        if not segment.source.startswith("%")
    ]
    longest = max(leaving, key=lambda s: s.length, default=None)
    return (None, 0) if longest is None else (longest.source, longest.length)


def _named(graph: _Graph, adds: list[_Found], streams: list[Stream]) -> list[Stream]:
    """Streams and sources get the names people use: `image` for the image tokens, `text` for the one other source."""
    image, _ = _image(graph, adds, streams)
    sources = list(dict.fromkeys(s.source for stream in streams for s in stream.tokens.segments))
    others = [s for s in sources if s != image]
    names = {image: "image"}
    names |= {s: "text" if len(others) == 1 else f"text{i}" for i, s in enumerate(others)}
    result: list[Stream] = []
    for stream in streams:
        tokens = Tokens(
            stream.tokens.dim,
            tuple(Segment(names[s.source], s.start, s.stop) for s in stream.tokens.segments),
        )
        name = "+".join(dict.fromkeys(s.source for s in tokens.segments))
        taken = sum(s.name.split("#")[0] == name for s in result)
        result.append(Stream(f"{name}#{taken}" if taken else name, stream.root, tokens, stream.width))
    return result


def _module_path(body: list[fx.Node]) -> str:
    """The module that all matrix products of the branch lie in, as Dynamo names it."""
    paths = []
    for node in body:
        stack = node.meta.get("nn_module_stack")
        if is_matmul(node) and stack:
            paths.append(_clean(list(stack.values())[-1][0]).split("."))
    if not paths:
        return ""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _clean(path: str) -> str:
    """`L['self'].__dict__['_modules']['blocks'].0.attn1` -> `blocks.0.attn1`."""
    path = re.sub(r"^L\['self'\]", "", path)
    path = re.sub(r"(\.__dict__)?(\['_modules'\]|\._modules)", "", path)
    path = re.sub(r"\[[\"']?([^\]\"']*)[\"']?\]", r".\1", path)
    return re.sub(r"\.+", ".", path).strip(".")


def find_grid(gm: fx.GraphModule, tokens: int) -> tuple[int, int, int] | None:
    """(frames, height, width) whose product is `tokens`, read from the patch embedding or from the unpatchify at the end.

    A patch embedding is a convolution whose output [.., D, height, width] or [B, D, frames, height, width] holds the
    tokens; an unpatchify splits the token axis of [B, tokens, D'] into the grid.
    """
    if tokens == 0:
        return None
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in (aten.conv2d.default, aten.conv3d.default):
            continue
        spatial = [int(s) for s in value_of(node).shape[2:]]
        if len(spatial) == 2 and tokens % prod(spatial) == 0:
            return tokens // prod(spatial), spatial[0], spatial[1]
        if len(spatial) == 3 and prod(spatial) == tokens:
            return spatial[0], spatial[1], spatial[2]
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "call_function" or node.target not in (
            aten.reshape.default,
            aten.view.default,
            aten.unflatten.int,
        ):
            continue
        before, after = list(value_of(node.args[0]).shape), list(value_of(node).shape)
        if len(before) == 3 and before[1] == tokens and len(after) > 4 and after[0] == before[0]:
            for rank in (3, 2):
                if prod(after[1 : 1 + rank]) == tokens:
                    return (1, 1, *map(int, after[1 : 1 + rank]))[-3:]  # type: ignore[return-value]
    return None
