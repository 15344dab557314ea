"""Running a function for some of its tokens, and what that must give: the rows of the result for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from hero_fx.passes.analysis.branch_tokens import check_whole
from hero_fx.passes.analysis.follow import follow
from hero_fx.passes.analysis.tokens import Segment, Source, Tokens
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import Emitter
from hero_fx.passes.rewrite.keep import Rows
from hero_fx.passes.rewrite.subset import Subset
from hero_fx.passes.rewrite.subset_ops import emit
from hero_fx.passes.slots import IndexSlot
from hero_fx.step_graphs import copy_graph

from .tracing import trace

TEXT, IMAGE, BATCH, WIDTH = 3, 5, 2, 4
TEXT_TOKENS, IMAGE_TOKENS = Source("text"), Source("image", "image")
TOKENS = Tokens(1, (Segment(TEXT_TOKENS, 0, TEXT), Segment(IMAGE_TOKENS, 0, IMAGE)))
LENGTHS = {TEXT_TOKENS: TEXT, IMAGE_TOKENS: IMAGE}

Function = Callable[..., Any]
Text = Literal["all", "none"]


def table(*shape: int) -> Tensor:
    """A tensor from outside of the branch."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def stream(seed: int = 0, width: int = WIDTH) -> Tensor:
    """Hidden states [BATCH, TEXT + IMAGE, width]."""
    return torch.randn(BATCH, TEXT + IMAGE, width, generator=torch.Generator().manual_seed(seed))


def tokens_of(function: Function, *inputs: Tensor) -> Tokens:
    """Where the tokens of the first input are in the result. Raises NoRule."""
    gm = trace(function, *inputs)
    (result,) = gm.graph.output_node().all_input_nodes
    infos = follow(gm.graph.nodes, {gm.graph.find_nodes(op="placeholder")[0]: TOKENS})
    check_whole(infos, LENGTHS)
    info = infos[result]
    assert isinstance(info, Tokens)
    return info


def origins(tokens: Tokens) -> list[tuple[Source, int]]:
    """The (source, number) of each token along an axis."""
    return [(s.source, i) for s in tokens.segments for i in range(s.start, s.stop)]


def kept_rows(tokens: Tokens, image: Tensor, text: Text) -> Tensor:
    """Positions along an axis of the tokens that are kept; of image tokens [K] or [BATCH, K], in the order of `image`."""
    if image.dim() == 2:
        return torch.stack([kept_rows(tokens, row, text) for row in image])
    rows: list[int] = []
    for segment, start, stop in tokens.spans():
        if segment.source.is_image:
            rows += [start + int(i) for i in image]
        elif segment.source != TEXT_TOKENS or text == "all":
            rows += range(start, stop)
    return torch.tensor(rows, dtype=torch.int64)


def take(value: Tensor, dim: int, rows: Tensor) -> Tensor:
    """The rows [K], or [BATCH, K] of a value with the batch in front."""
    if rows.dim() == 1:
        return value.index_select(dim, rows)
    return torch.stack([v.index_select(dim - 1, r) for v, r in zip(value, rows, strict=True)])


def attend_to_all(subset: Subset, node: fx.Node) -> fx.Node:
    """Kept queries, all keys and values."""
    return subset.emitter.call(node.target, subset.env[node.args[0]], *node.args[1:])


def emit_subset(gm: fx.GraphModule, image: Tensor, text: Text) -> Tokens:
    """Adds to the outputs of `gm` its result for the kept tokens only, or None where none are kept; an index comes in."""
    source, (result,) = gm.graph.find_nodes(op="placeholder")[0], gm.graph.output_node().all_input_nodes
    infos = follow(gm.graph.nodes, {source: TOKENS})
    check_whole(infos, LENGTHS)
    emitter = Emitter(gm)
    index = emitter.selection(IndexSlot(None), image.shape[-1], image.device)
    index.meta["val"] = index.meta["val"].expand(image.shape)
    with emitter.before(emitter.output):
        subset = Subset(emitter, infos, {IMAGE_TOKENS: Rows(index), TEXT_TOKENS: text}, attend_to_all)
        subset.seed(source)
        for node in infos:
            if node is not source:
                emit(subset, node)
    emitter.output.args = ((result, subset.env[result]),)
    gm.graph.lint()
    gm.recompile()
    return subset.tokens(result) or TOKENS


def check(function: Function, *externals: Tensor, x: Tensor | None = None, image: Tensor, text: Text) -> Tokens:
    """Computing for the kept tokens is keeping from what is computed for all of them.

    `function` takes the stream and the externals. Which token is where in its result is checked too, by changing one
    token of the stream at a time, unless tokens meet in attention. Returns where the tokens are.
    """
    return check_texts(function, *externals, x=x, image=image, texts=(text,))


def check_texts(
    function: Function, *externals: Tensor, x: Tensor | None = None, image: Tensor, texts: Sequence[Text]
) -> Tokens:
    """`check` for several texts, from one trace."""
    x = stream() if x is None else x
    traced, whole = trace(function, x, *externals), function(x, *externals)
    for text in texts:
        gm = copy_graph(traced)
        tokens = emit_subset(gm, image, text)
        result, part = gm(x, *externals, image)
        assert torch.equal(result, whole)
        rows = kept_rows(tokens, image, text)
        if rows.numel():
            torch.testing.assert_close(part, take(whole, tokens.dim, rows), rtol=1e-6, atol=1e-6)
        else:
            assert part is None
    if any(node.target in ATTENTION for node in traced.graph.nodes):
        return tokens
    places = origins(tokens)
    for number, origin in enumerate(origins(TOKENS)):
        changed = x.clone()
        changed[:, number] += 1.5
        differs = (function(changed, *externals) != whole).movedim(tokens.dim, 0).flatten(1).any(1)
        assert all(places[i] == origin for i in differs.nonzero().flatten().tolist()), f"{origin} moved"
    return tokens
