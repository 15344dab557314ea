"""Transformers of every make, put together from one set of parts; weights are drawn, nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

D = 8


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, D] each, two heads."""
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Part(nn.Module):
    """What the models below are put together from."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)
        self.kv, self.both = nn.Linear(6, 2 * D), nn.Linear(D + 12, D)
        self.modulation = nn.Linear(6, 6 * D)

    def attention(self, x: Tensor) -> Tensor:
        return self.out(attend(*self.qkv(x).chunk(3, dim=-1)))  # type: ignore[no-any-return]

    def ffn(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


Layer = Callable[..., Any]


class Model(nn.Module):
    """`layer(part, *streams)` for each of `layers` parts."""

    def __init__(self, layer: Layer, layers: int = 2) -> None:
        super().__init__()
        self.layer, self.parts = layer, nn.ModuleList(Part() for _ in range(layers))

    def forward(self, *streams: Any) -> Any:
        for part in self.parts:
            changed = self.layer(part, *streams)
            changed = changed if isinstance(changed, tuple) else (changed,)
            streams = (*changed, *streams[len(changed) :])
        return streams[: len(changed)]


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,))
