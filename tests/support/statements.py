"""What a generated layer may do: statements about an image stream, a text stream and a buffer.

They are chosen to look like what the passes write themselves, or to write to memory that the passes read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from . import small
from .small import norm

TEXT = 2
"""Text tokens."""


@dataclass
class State:
    """What a layer works on."""

    block: small.Block
    x: Tensor
    text: Tensor
    gate: Tensor
    more: list[Tensor] = field(default_factory=list)


Statement = Callable[[State], None]
STATEMENTS: dict[str, Statement] = {}


def statement(function: Statement) -> Statement:
    STATEMENTS[function.__name__] = function
    return function


@statement
def attend(s: State) -> None:
    s.x = s.x + s.block.attention(s.x)


@statement
def attend_jointly(s: State) -> None:
    out = s.block.attention(torch.cat([s.text, s.x], 1))
    s.text, s.x = s.text + out[:, :TEXT], s.x + s.gate * out[:, TEXT:]


@statement
def feed(s: State) -> None:
    s.x = s.x + s.block.ffn(s.x)


@statement
def feed_gated(s: State) -> None:
    s.x = s.x + s.gate * s.block.ffn(s.x)


@statement
def feed_text(s: State) -> None:
    s.text = s.text + s.block.ffn(s.text)


@statement
def both_at_once(s: State) -> None:
    s.x = s.x + s.block.attention(s.x) + s.gate * s.block.ffn(s.x)


@statement
def three_times(s: State) -> None:
    for number in range(3):
        s.x = s.x + s.block.ffn(s.x * (number + 0.5))


@statement
def feed_by_addcmul(s: State) -> None:
    s.x = torch.addcmul(s.x, s.gate, s.block.ffn(s.x))


@statement
def feed_in_place(s: State) -> None:
    s.x += s.block.ffn(s.x)


@statement
def return_the_update(s: State) -> None:
    update = s.block.ffn(s.x)
    s.more += [update, update[:, 1:].transpose(0, 1)]
    s.x = s.x + update


@statement
def return_the_gated_update(s: State) -> None:
    update = s.gate * s.block.ffn(s.x)
    s.more.append(update[0])
    s.x = s.x + update


@statement
def return_the_streams(s: State) -> None:
    s.more += [s.x, s.text[0]]


@statement
def gather_own(s: State) -> None:
    s.x = s.x.index_select(-2, s.block.perm)


@statement
def gather_twice(s: State) -> None:
    table = s.block.scratch.index_select(0, s.block.perm)
    s.x = s.x + table * s.x.index_select(1, s.block.perm) + s.block.scratch.index_select(0, s.block.perm)


@statement
def scatter_own(s: State) -> None:
    s.x = s.x + s.block.scratch * torch.index_copy(s.x, -2, s.block.perm, s.x * 0.5)


@statement
def scatter_repeated(s: State) -> None:
    twice = torch.cat([s.block.perm[:1]] * 2)
    s.x = s.x + torch.index_copy(s.x, 1, twice, s.x[:, 2:4]).index_select(1, twice)[:, :1]


@statement
def scatter_the_update(s: State) -> None:
    update = s.block.ffn(s.x)
    s.x = s.x + update.index_copy(1, s.block.perm[:2], update[:, :2] * 2)


@statement
def write_a_slice_of_the_buffer(s: State) -> None:
    before = s.block.scratch * 2
    s.block.scratch[1:3] = s.x[0, 1:3]
    s.x = s.x + before + s.block.scratch * 2


@statement
def write_a_diagonal_of_the_buffer(s: State) -> None:
    before = norm(s.block.scratch)
    s.block.scratch.diagonal().copy_(s.x[0, 0])
    s.x = s.x + before * norm(s.block.scratch)


@statement
def write_the_buffer_within_a_branch(s: State) -> None:
    update = s.block.ffn(s.x * s.block.scratch)
    s.block.scratch.add_(1)
    s.x = s.x + update


@statement
def write_the_buffer_from_a_branch(s: State) -> None:
    hidden = s.block.up(norm(s.x + s.block.scratch))
    s.block.scratch.copy_(s.block.down(hidden)[0])
    s.x = s.x + s.block.down(F.gelu(hidden))


@statement
def write_a_table_behind_its_branch(s: State) -> None:
    table = s.block.scratch
    s.x = s.x + s.block.attention(s.x * table)
    table[:, 0] = s.x[0, :, 1]


@statement
def write_the_gate(s: State) -> None:
    gate = s.block.scratch[:1]
    s.x = s.x + gate * s.block.ffn(s.x)
    s.block.scratch.mul_(0.5)
    s.x = s.x + gate * s.block.ffn(s.x)


@statement
def write_the_update(s: State) -> None:
    update = s.block.ffn(s.x)
    update[0].diagonal().add_(1)
    s.x = s.x + update


@statement
def write_the_update_behind_its_use(s: State) -> None:
    update = s.block.ffn(s.x)
    s.x = s.x + update
    update[0].diagonal().add_(1)
    s.x = s.x + norm(update)


@statement
def write_the_stream(s: State) -> None:
    s.x[0].diagonal().mul_(0.5)
    s.x[:, 1:3].add_(0.25)


@statement
def write_what_a_branch_reads(s: State) -> None:
    scaled = norm(s.x)
    out = s.block.down(F.gelu(s.block.up(scaled)))
    scaled[0].diagonal().zero_()
    s.x = s.x + out + scaled


@statement
def write_the_keys(s: State) -> None:
    q, k, v = (part.unsqueeze(1) for part in s.block.qkv(norm(s.x)).chunk(3, dim=-1))
    out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
    k[0, 0].diagonal().zero_()
    s.x = s.x + s.block.out(out) + k.squeeze(1)


@statement
def write_a_whole_reused_temporary(s: State) -> None:
    part = s.x[:, ::2] * 1
    part[0].diagonal().add_(1)
    s.x = s.x + part.sum(1, keepdim=True)


@statement
def frames(s: State) -> None:
    s.x = (s.x.unflatten(1, (2, 3)) * s.block.scratch[:2, None]).flatten(1, 2)
