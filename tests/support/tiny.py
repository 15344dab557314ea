"""Tiny seeded models and denoising loops that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hero_fx import Backend
from hero_fx.passes.compat import argument_name

from .tracing import Shared

TEXT, CHANNELS, WIDTH = 7, 4, 24
GRID = (3, 4, 6)
INNER = "eager"
"""What runs step graphs in tests of what the graphs compute and of when they run.

Where constants, aliases and writes in place are the question, tests say "aot_eager": what Inductor is handed.
"""


def randomized(model: Any, seed: int = 1) -> Any:
    """Constant parameters (norms, zero-initialised gates) made random, so that leaving one out shows; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def cogvideox(
    *, layers: int = 4, rotary: bool = True, grid: tuple[int, int, int] = GRID, channels: int = CHANNELS
) -> Any:
    """A CogVideoX transformer whose image tokens lie on `grid`."""
    from diffusers import CogVideoXTransformer3DModel  # takes seconds, and a process of its own may want a toy alone

    torch.manual_seed(0)
    frames, height, width = grid
    model: Any = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        time_embed_dim=20,
        text_embed_dim=WIDTH,
        num_layers=layers,
        sample_width=2 * width,
        sample_height=2 * height,
        sample_frames=4 * (frames - 1) + 1,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
    )
    return randomized(model)


def inputs(
    *, batch: int = 2, rotary: bool = True, grid: tuple[int, int, int] = GRID, channels: int = CHANNELS, seed: int = 3
) -> dict[str, Any]:
    """Keyword arguments of a call, without the timestep."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    result: dict[str, Any] = {
        "hidden_states": torch.randn(batch, frames, channels, 2 * height, 2 * width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, WIDTH, generator=generator),
    }
    if rotary:
        angle = torch.randn(frames * height * width, 8, generator=generator).repeat_interleave(2, dim=1)
        result["image_rotary_emb"] = (angle.cos(), angle.sin())
    return result


def timesteps(steps: int) -> Tensor:
    """int64 [steps], descending, as a scheduler makes them."""
    return torch.linspace(999, 19, steps).round().long()


def denoise(call: Callable[..., Any], kwargs: dict[str, Any], times: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A closed denoising loop: each step's latents come from the outputs before. Returns every output of `call`."""
    latents, outputs = kwargs["hidden_states"], []
    with torch.no_grad():
        for t in times:
            batch = latents.shape[0]
            out = call(**{**kwargs, "hidden_states": latents}, timestep=t.expand(batch), return_dict=False)[0]
            outputs.append(out)
            latents = latents - out / len(times)
    return outputs


def worst(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest relative error over all steps: max |a - b| / max |b|."""
    assert len(ours) == len(theirs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


# As Dynamo does, which keeps what it compiled: a backend forgets what no one holds.
_DYNAMO: WeakKeyDictionary[Backend, list[Any]] = WeakKeyDictionary()


class Captured:
    """The Dynamo graph of a model, captured and normalised once: tests give it to many backends."""

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        found: list[Any] = []

        def capture(gm: Any, inputs: list[Any]) -> Any:
            found.append((gm, list(inputs)))
            return gm.forward

        compiled: Any = torch.compile(model, backend=capture, fullgraph=True)
        torch._dynamo.reset()
        with torch.no_grad():
            compiled(**kwargs, timestep=timesteps(1).expand(kwargs["hidden_states"].shape[0]), return_dict=False)
        torch._dynamo.reset()
        self.gm, self.inputs = found[0]
        self.shared = Shared(self.gm, self.inputs)
        self.names = [argument_name(node) for node in self.gm.graph.find_nodes(op="placeholder")]

    def compiled(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        """What `torch.compile(model, backend=backend)` would call, with the model's keyword arguments."""
        run = self.shared.compiled(backend)
        if isinstance(backend, Backend):
            _DYNAMO.setdefault(backend, []).append(run)

        def call(**kwargs: Any) -> Any:
            kwargs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            return run(*[kwargs.get(name, value) for name, value in zip(self.names, self.inputs, strict=True)])

        return call


@cache
def captured(*, layers: int = 4, rotary: bool = True, batch: int = 2) -> Captured:
    """A tiny CogVideoX on `GRID`, captured."""
    return Captured(cogvideox(layers=layers, rotary=rotary), inputs(batch=batch, rotary=rotary))
