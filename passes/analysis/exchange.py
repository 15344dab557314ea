"""What processes send each other: the collectives of a graph, and the token axis through an exchange of equal parts.

Under Ulysses each of W ranks holds N / W of the tokens and all heads. Two exchanges stand around each attention: the first
gives a rank all N tokens of H / W heads, the second takes that back:

    [B, N/W, H, D] -> [W, N/W, B, H/W, D] -> all_to_all_single -> [W * N/W, B, H/W, D] -> attention -> ... -> [B, N/W, H, D]

Every rank runs the same graph. Row n of what a rank gets is made of rows n of all ranks and of nothing else, so the exchange
does to the token axis what a pointwise op does, as long as all ranks keep the same rows of their own tokens. They do: rows are
drawn by a generator whose seed and sizes are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from hero_fx.passes.ops import COLLECTIVES, EXCHANGES, WAITS, argument, ints_argument

from .rules import Rule
from .tokens import Lookup, NoRule, Tokens, one_input

__all__ = ["EXCHANGING", "collectives", "ranks_of"]


def _exchange(node: fx.Node, look: Lookup) -> Tokens:
    """Each rank gets as much as it gives, and no part ends within a run of tokens."""
    _source, tokens = one_input(node, look)
    parts = ints_argument(node, "input_split_sizes")
    if len({*parts, *ints_argument(node, "output_split_sizes")}) != 1:
        raise NoRule(node, "ranks exchange parts of different sizes, so they hold different numbers of tokens")
    if tokens.dim == 0 and tokens.outer % len(parts):
        raise NoRule(node, "it cuts the token axis between ranks")
    return replace(tokens, exchanged=not tokens.exchanged)


def _wait(node: fx.Node, look: Lookup) -> Tokens:
    return one_input(node, look)[1]


EXCHANGING: Mapping[Any, Rule] = {**dict.fromkeys(EXCHANGES, _exchange), **dict.fromkeys(WAITS, _wait)}
"""By overload."""


def collectives(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls in which this process waits for others."""
    return [node for node in gm.graph.nodes if node.target in COLLECTIVES]


def ranks_of(gm: fx.GraphModule) -> int:
    """Among how many ranks a graph's attention is exchanged; 1 where it is not."""
    exchanges = [node for node in gm.graph.nodes if node.target in EXCHANGES]
    return max((len(argument(node, "input_split_sizes")) for node in exchanges), default=1)
