"""A model to save and load, what is saved of it, and what stands in for AOTInductor."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hero_fx
from hero_fx.warm import load as loading
from hero_fx.warm import save as saving

from . import toys
from .toys import CHANNELS, GRID, WIDTH, latents, torch_compile

STEPS = 7


class Processor:
    """As diffusers' attention processors: no module."""

    heads = 1

    def __init__(self) -> None:
        self.heads = 2


class Told(nn.Module):
    """A toy with arguments that are no tensors, a text, a table of its own, and results by name."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.inner = toys.toy(layers)
        self.read = nn.Linear(WIDTH, CHANNELS)
        self.gains, self.processor = {"a": [1.0]}, Processor()
        self.table = torch.linspace(0, 1, CHANNELS)  # neither parameter nor buffer
        self.eval().requires_grad_(False)

    def forward(
        self, latents: Tensor, timestep: Tensor, text: tuple[Tensor, ...], gain: float = 1.0, return_dict: bool = True
    ) -> Any:
        said = sum(self.read(part).mean(dim=1, keepdim=True) for part in text)
        noise = self.inner(latents + said + self.table, timestep) * gain
        return {"noise": noise, "gain": gain, "given": latents} if return_dict else (noise,)


def told(layers: int = 2) -> Told:
    torch.manual_seed(0)
    return Told(layers)


def text(seed: int = 5, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, length, WIDTH, generator=generator) for length in (3, 5))


@dataclass
class Packages:
    """In place of AOTInductor, which takes ten seconds a graph: packages that name step graphs kept here."""

    graphs: dict[str, Any]

    def compile(self, gm: Any, inputs: list[Tensor], path: Path, **_: Any) -> None:
        name = f"graph {len(self.graphs)}"
        self.graphs[name] = gm
        path.write_text(name)

    def load(self, path: Path) -> Callable[..., list[Tensor]]:
        gm = self.graphs[path.read_text()]
        return lambda *inputs: list(gm(*inputs))


@contextmanager
def packages_in_memory() -> Iterator[None]:
    """Nothing is compiled within it."""
    kept = Packages({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "compile_package", kept.compile)
        patch.setattr(loading, "load_package", kept.load)
        yield


def lanes(call: Callable[..., Any], batch: int = 2, steps: int = STEPS, seed: int = 3, **more: Any) -> list[Tensor]:
    """A closed loop with guidance, the model called once for each branch: every output."""
    x, outputs = latents(batch, seed), []
    texts = text(batch=batch), text(6, batch=batch)
    with torch.no_grad():
        for time in toys.times(steps, batch):
            cond, uncond = (call(x, time, text=own, **more)["noise"] for own in texts)
            outputs += [cond, uncond]
            x = x - (uncond + 2 * (cond - uncond)) / steps
    return outputs


@dataclass
class Saved:
    path: Path
    live: dict[int, list[Tensor]]
    """By batch size, what the live compile gave."""
    stats: hero_fx.Stats


def save_two_sizes(path: Path) -> Saved:
    """Two batch sizes of a model in one file."""
    torch._dynamo.reset()
    backend = hero_fx.backend(grid=GRID, num_steps=STEPS, inner="eager")
    compiled = torch_compile(told(), backend, fullgraph=True)
    live = {batch: lanes(compiled, batch) for batch in (2, 1)}
    hero_fx.save(compiled, path)
    return Saved(path, live, backend.stats())


def run(call: Callable[..., Any], **changes: Any) -> Any:
    """One call as it was saved, but for `changes`."""
    with torch.no_grad():
        return call(**{"latents": latents(), "timestep": toys.times(1)[0], "text": text(), **changes})


def edited(path: Path, to: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of a file with other metadata."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "metadata.json":
                known = json.loads(content)
                edit(known)
                content = json.dumps(known).encode()
            new.writestr(name, content)
    return to
