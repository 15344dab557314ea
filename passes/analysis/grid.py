"""The grid that image tokens lie on: frames, height, width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import fx

from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import RESHAPES

__all__ = ["find_grid", "shard_of"]

aten = torch.ops.aten
Grid = tuple[int, int, int]


def find_grid(gm: fx.GraphModule, tokens: int, ranks: int = 1) -> Grid | None:
    """(frames, height, width) whose product is `tokens`, where the graph shows it; `ranks`: processes that have as many each.

    Read from what is found first of: a patch embedding (a convolution whose output [.., D, height, width] or
    [B, D, frames, height, width] holds the tokens); an unpatchify that splits the token axis of [B, tokens, D'] at the
    end; the mesh that positions are made of; a reshape that folds a grid into the token axis (a rotary table, or patches).
    """
    if ranks > 1:
        whole = find_grid(gm, tokens * ranks)
        return whole and shard_of(whole, ranks)
    if tokens == 0:
        return None
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    reshapes = [node for node in calls if node.target in RESHAPES]
    shown = [*_of_convolutions(calls, tokens), *_of_unpatchify(reshapes, tokens), *_of_meshes(calls, tokens)]
    # A line of tokens is no grid: patches cut out one by one look like it.
    return next((g for g in [*shown, *_of_tables(reshapes, tokens)] if g.count(1) < 2), None)


def shard_of(grid: Grid, ranks: int) -> Grid | None:
    """The part of a grid that each of several ranks has, where that is a grid: whole frames, or whole rows of one frame."""
    frames, height, width = grid
    if frames % ranks == 0:
        return frames // ranks, height, width
    return (1, height // ranks, width) if frames == 1 and height % ranks == 0 else None


def _of_convolutions(calls: list[fx.Node], tokens: int) -> Iterator[Grid]:
    for node in calls:
        if node.target not in (aten.conv2d.default, aten.conv3d.default):
            continue
        spatial = [int(s) for s in value_of(node).shape[2:]]
        if len(spatial) == 2 and tokens % prod(spatial) == 0:
            yield tokens // prod(spatial), spatial[0], spatial[1]
        if len(spatial) == 3 and prod(spatial) == tokens:
            yield spatial[0], spatial[1], spatial[2]


def _of_unpatchify(reshapes: list[fx.Node], tokens: int) -> Iterator[Grid]:
    for node in reversed(reshapes):
        before, after = list(value_of(node.all_input_nodes[0]).shape), list(value_of(node).shape)
        if len(before) == 3 and before[1] == tokens and len(after) > 4 and after[0] == before[0]:
            for rank in (3, 2):
                if prod(after[1 : 1 + rank]) == tokens:
                    yield _grid(after[1 : 1 + rank])


def _of_meshes(calls: list[fx.Node], tokens: int) -> Iterator[Grid]:
    for node in calls:
        if str(node.target).startswith("aten.meshgrid"):
            mesh = [int(s) for s in value_of(node)[0].shape]
            if len(mesh) in (2, 3) and prod(mesh) == tokens:
                yield _grid(mesh)


def _of_tables(reshapes: list[fx.Node], tokens: int) -> Iterator[Grid]:
    for node in reshapes:
        before, after = list(value_of(node.all_input_nodes[0]).shape), list(value_of(node).shape)
        for at in range(len(before) - 2):
            grid, rest = before[at : at + 3], before[at + 3 :]
            folds = after == [*before[:at], tokens, *rest] and len(rest) < 2
            patches = at == 0 and len(rest) > 1 and after == [tokens, prod(rest)]
            if (folds or patches) and prod(grid) == tokens:
                yield _grid(grid)


def _grid(sizes: Sequence[int]) -> Grid:
    """Two or three sizes as (frames, height, width)."""
    frames, height, width = (1, 1, *map(int, sizes))[-3:]
    return frames, height, width
