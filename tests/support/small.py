"""Small transformers that test the limits of a rewrite: each does one thing in its layers that a pass could take for ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hero_fx

from . import tiny, toys
from .tracing import Traced

BATCH, GRID, TOKENS, WIDTH = 2, (1, 2, 3), 6, 4
TIMES = tiny.timesteps(6)  # full steps are 0, 2 and 4
SAMPLED: dict[str, Any] = {"grid": GRID, "patch": GRID, "refresh_ratio": 1 / 3}  # two tokens of six
POLICIES: dict[str, dict[str, Any]] = {
    "hero": SAMPLED,
    "reuse": {**SAMPLED, "unsampled": "reuse"},
    "lean": {**SAMPLED, "policy": "lean"},
    "fora": {"policy": "fora"},
    "fora behind the gate": {"policy": "fora", "cache_point": "post_gate"},
    "taylorseer": {"policy": "taylorseer", "cache_point": "post_gate"},
    "toca": {"policy": "toca", "grid": GRID, "refresh_ratio": 1 / 3},
}
FULL = (0, 2, 4)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


class Block(nn.Module):
    """The parts of a layer, and a buffer of its own."""

    scratch: Tensor
    perm: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scratch", torch.randn(TOKENS, WIDTH))
        self.register_buffer("perm", torch.tensor([3, 1, 5, 0, 2, 4]))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(norm(x)).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))  # type: ignore[no-any-return]

    def ffn(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(norm(x))))  # type: ignore[no-any-return]


Layer = Callable[[Block, Tensor, Tensor], Any]
End = Callable[[Tensor, list[Tensor]], Any]


class Small(nn.Module):
    """x = layer(block, x, time) for each block; latents [B, TOKENS, WIDTH] and a timestep [B].

    A layer may return (x, more): `end` makes of the last x and of what came more what the model returns.
    """

    def __init__(self, layers: Sequence[Layer], end: End, clock: float) -> None:
        super().__init__()
        self.layers, self.end, self.clock = tuple(layers), end, clock
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in layers)

    def forward(self, latents: Tensor, timestep: Tensor) -> Any:
        time = (timestep[:, None, None] * self.clock).cos()
        x, more = self.first(latents) * (2 + time), []
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x = layer(block, x, time)  # type: ignore[arg-type]
            if isinstance(x, tuple):
                more.append(x[1])
                x = x[0]
        return self.end(self.last(norm(x)), more)


def plain(block: Block, x: Tensor, time: Tensor) -> Tensor:
    x = x + time * block.attention(x)
    return x + time * block.ffn(x)


def the_last(x: Tensor, more: list[Tensor]) -> Any:
    return x


def small(*layers: Layer, end: End = the_last, clock: float = 1e-3, seed: int = 0) -> Small:
    """A seeded model in eval mode; with `clock=0` it does the same at every timestep."""
    torch.manual_seed(seed)
    return Small(layers or (plain, plain), end, clock).eval().requires_grad_(False)


def start(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(model: Any, *, constant: bool = False, times: Tensor = TIMES) -> list[Any]:
    """The outputs of a denoising loop, as they are when it is over; with `constant` it stands still."""
    x, outputs = start(), []
    with torch.no_grad():
        for t in times:
            outputs.append(model(x.clone(), t.expand(BATCH)))
            first = tensors(outputs[-1])[0]
            x = x if constant or first.shape != x.shape else x - first / len(times)
    return outputs


def tensors(value: Any) -> list[Tensor]:
    """The tensors in what a model returns, copied."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]


def backend(policy: str = "hero", **options: Any) -> hero_fx.Backend:
    """HERO with one of `POLICIES`, or with other options; full steps are `FULL`."""
    return hero_fx.backend(**{"inner": "aot_eager", "warmup": 1, "cooldown": 0, **POLICIES[policy], **options})


def hero(model: nn.Module, policy: str = "hero", **options: Any) -> Any:
    """A copy of the model, compiled with HERO; buffers that it writes to are its own."""
    return toys.torch_compile(copy.deepcopy(model), backend=backend(policy, **options), fullgraph=True)


def traced(model: nn.Module) -> Traced:
    """A copy of the model, traced for several backends."""
    return Traced(copy.deepcopy(model), start(), TIMES[0].expand(BATCH))


def error(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Largest relative error over steps and outputs."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(tensors(a), tensors(b), strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs)
