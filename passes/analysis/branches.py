"""Finding the attention and FFN branches of each layer, from the graph's structure alone.

A transformer updates a residual stream by `x = x + f(norm(x))`, often `x + gate * f(norm(x))`. In the graph that is an
`add` whose one operand (the update) depends on the other (the residual) through a matrix product. Updates whose
computations share a matrix product belong to one branch: joint attention updates the image and the text stream. A
branch is attention if an attention op is inside, and FFN if not. No module or class name is looked at; `nn_module_stack`
only gives branches names for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import fx

from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import value_of

from .branch_names import Labels, LayerNumbers, module_path
from .branch_tokens import below
from .exchange import ranks_of
from .grid import find_grid
from .residuals import Ancestry, ResidualAdd, feature_of, is_product_of_values, residual_adds
from .streams import find_image, find_outputs, find_streams
from .structure import Branch, Structure, Update
from .tokens import Source, is_matmul

__all__ = ["find_branches"]

aten = torch.ops.aten


def find_branches(gm: fx.GraphModule) -> Structure:
    """The residual branches of a normalised graph, layer by layer; a structure without branches if there are none.

    Only what the layers on the image tokens hold is a branch. Residual updates that no attention belongs to
    (convolutions around the transformer, an MLP on embeddings), and those that never see an image token (refiners of the
    text), stay what they are: every step computes them.
    """
    graph = Ancestry(gm.graph)
    adds = _main(graph, residual_adds(graph))
    if not adds:
        return Structure((), (), None, 0, None)
    streams = find_streams(graph, adds)
    values = {found.residual: found.stream for found in adds} | {found.add: found.stream for found in adds}
    numbers, labels = LayerNumbers(streams), Labels()
    branches = [_branch(graph, group, values, numbers, labels) for group in _groups(adds)]
    labels.check()
    image = find_image(graph, adds, streams)
    count = 0 if image is None else image.length
    ranks = ranks_of(gm)
    return Structure(
        branches=tuple(branches),
        streams=tuple(streams),
        image=None if image is None else image.source,
        image_tokens=count,
        grid=find_grid(gm, count, ranks),
        ranks=ranks,
    )


def _branch(
    graph: Ancestry, group: list[ResidualAdd], values: Mapping[fx.Node, int], numbers: LayerNumbers, labels: Labels
) -> Branch:
    """The branch of updates that belong together; `values`: the stream of each stream value."""
    sources = list(dict.fromkeys(f.source for f in group))
    targets = [f.update for f in group]
    body = graph.between(sources, targets)
    kind = _kind(graph, body, [n for n in body if n.target in ATTENTION], sources)
    layer = numbers.next(kind, group)
    updates = tuple(
        Update(
            stream=f.stream,
            add=f.add.name,
            residual=f.residual.name,
            source=f.source.name,
            update=f.update.name,
            feature=feature_of(graph, f.update, sources).name,
        )
        for f in group
    )
    reads = _reads(targets, values)
    return Branch(
        layer=layer,
        kind=kind,
        label=labels.next(layer, kind),
        module=module_path(body),
        updates=updates,
        reads=tuple((n.name, values[n]) for n in reads),
        attention=tuple(n.name for n in below(reads, targets) if n.target in ATTENTION),
    )


def _main(graph: Ancestry, adds: list[ResidualAdd]) -> list[ResidualAdd]:
    """The updates of streams with attention that depend on a stream which comes out of the model."""
    if not any(found.attends for found in adds):
        return adds
    streams = find_streams(graph, adds)
    sources = [stream.tokens.sources for stream in streams]
    attended: set[Source] = set()
    for group in _groups(adds):
        if any(found.attends for found in group):
            attended.update(*(sources[found.stream] for found in group))
    adds = [found for found in adds if sources[found.stream] & attended]
    outputs = {segment.source for segment in find_outputs(graph, adds, streams)}
    owners = {f.add: sources[f.stream] for f in adds} | {f.residual: sources[f.stream] for f in adds}
    made = {f.add for f in adds}
    roots = [f.residual for f in adds if f.residual not in made]
    for root in reversed(roots):
        if owners[root] & outputs:
            # Where no rule follows the tokens (frames fold into the batch), it is still the same values that come in,
            # if they are most of the stream: text that is written into a packed sequence is not.
            moved = [owners[n] for n in _moved_from(root, owners) if 2 * _size(n) >= _size(root)]
            outputs |= set().union(*(sources for sources in moved if sources.isdisjoint(owners[root])))
    roots = [root for root in roots if owners[root] & outputs]
    return [f for f in adds if not roots or any(f.update is r or graph.depends(f.update, r) for r in roots)]


def _size(node: fx.Node) -> int:
    return prod(int(size) for size in value_of(node).shape)


def _moved_from(root: fx.Node, values: Mapping[fx.Node, frozenset[Source]]) -> set[fx.Node]:
    """The stream values that a root is made of without any matrix product."""
    met: set[fx.Node] = set()
    seen, todo = {root}, [root]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in values:
                met.add(source)
            elif source not in seen and not is_matmul(source):
                seen.add(source)
                todo.append(source)
    return met


def _groups(adds: list[ResidualAdd]) -> list[list[ResidualAdd]]:
    """Updates that share a matrix product, in order of their first add."""
    groups: list[list[ResidualAdd]] = []
    owner: dict[fx.Node, int] = {}
    for found in adds:
        number = max((owner[n] for n in found.matmuls if n in owner), default=len(groups))
        if number == len(groups):
            groups.append([])
        groups[number].append(found)
        owner.update(dict.fromkeys(found.matmuls, number))
    return groups


def _reads(targets: list[fx.Node], values: Mapping[fx.Node, int]) -> list[fx.Node]:
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


def _kind(graph: Ancestry, body: list[fx.Node], attention: list[fx.Node], sources: list[fx.Node]) -> str:
    meeting: list[tuple[fx.Node, list[fx.Node]]] = []  # where tokens meet, and what must come from the stream
    for node in attention:
        key = node.args[ATTENTION[node.target].key]
        assert isinstance(key, fx.Node)
        meeting.append((node, [key]))
    if not attention:  # written out, or linear
        meeting = [(n, n.all_input_nodes) for n in body if is_product_of_values(graph, n)]
    if not meeting:
        return "ffn"

    def moves(node: fx.Node) -> bool:
        return any(node is s or graph.depends(node, s) for s in sources)

    if not any(all(map(moves, parts)) for _, parts in meeting[:1]):
        return "cross_attention"
    if not attention:
        return "attention"
    # A product that neither feeds attention nor reads it is an FFN beside it, or a gate of what attention gives.
    for node in body:
        if (
            node not in attention
            and is_matmul(node)
            and not any(graph.depends(a, node) or graph.depends(node, a) for a in attention)
            and not _gates(graph, node, body, attention)
        ):
            return "parallel"
    return "attention"


def _gates(graph: Ancestry, node: fx.Node, body: list[fx.Node], attention: list[fx.Node]) -> bool:
    """Whether attention's results meet what comes of `node` in multiplications alone."""
    inside, seen, todo, met = set(body), {node}, [node], False
    while todo:
        for user in todo.pop().users:
            if user in seen or user not in inside:
                continue
            others = [n for n in user.all_input_nodes if n not in seen]
            if not any(n is a or graph.depends(n, a) for n in others for a in attention):
                seen.add(user)
                todo.append(user)
            elif user.target is aten.mul.Tensor:
                met = True
            else:
                return False
    return met
