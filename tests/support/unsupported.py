"""Models that step caching cannot serve, what the error must say of each, and the checks of such errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import hero_fx

from . import tiny, toys

TIME = toys.times(1)[0]


def frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def backend(**options: Any) -> hero_fx.Backend:
    return hero_fx.backend(**{"inner": tiny.INNER, "grid": toys.GRID, **options})


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))

    def forward(self, latents: Tensor, timestep: Tensor) -> Any:
        return self.layers(latents) * timestep[:, None, None]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(toys.TOKENS, toys.TOKENS, 3, padding=1) for _ in range(3))

    def forward(self, latents: Tensor, timestep: Tensor) -> Any:
        for layer in self.layers:
            latents = latents + layer(latents) * timestep[:, None, None]
        return latents * 2


class BreakBefore(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        latents = latents * 2
        torch._dynamo.graph_break()
        return super().forward(latents, timestep)


class BreakBehind(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        result = super().forward(latents, timestep)
        torch._dynamo.graph_break()
        return result * 2


class BreakBetween(toys.ToyDiT):
    """Not in a loop: there Dynamo would give up on the whole function."""

    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        x, embedding = self.first(latents), self.time(toys.sinusoid(timestep))[:, None]
        x = self.blocks[2](self.blocks[0](x, embedding), embedding)
        torch._dynamo.graph_break()
        result: Tensor = self.last(self.blocks[2](self.blocks[1](x, embedding), embedding))
        return result


class Untimed(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        return super().forward(latents, torch.zeros(2))


WHOLE = "compile the whole transformer"
BREAK = r"graph break.*torch.compile\(..., fullgraph=True\)"

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "mlp": (lambda: frozen(MLP()), f"no attention or FFN branch was found: .*{WHOLE}"),
    "conv net": (lambda: frozen(ConvNet()), f"no attention was found in the 3 residual branches.*{WHOLE}"),
    "break before": (lambda: frozen(BreakBefore()), BREAK),
    "break between": (lambda: frozen(BreakBetween()), BREAK),
    "break behind": (lambda: frozen(BreakBehind()), BREAK),
    "break in a loop": (lambda: toys.toy(between=torch._dynamo.graph_break), BREAK),
    "training": (lambda: toys.toy().train(), r"model.training=True.*call model.eval\(\)"),
    "one layer": (lambda: toys.toy(layers=1), f"single transformer block.*{WHOLE}"),
    "no time": (lambda: frozen(Untimed()), r"no timestep was found among .*latents.*backend\(timestep='...'\)"),
}


def check_message(call: Callable[[], Any], fix: str, kind: type[Exception] = hero_fx.UnsupportedModel) -> None:
    """The error that the user sees has the whole message, and the kind of the one that was raised."""
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=f"(?s){fix}") as error:
        call()
    assert type(error.value.inner_exception) is kind
