"""Training that stops and resumes anywhere, with the same weights in the end: what the examples' models have in common."""

from __future__ import annotations

import argparse
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

__all__ = ["Training", "add_options", "check_options", "train"]


class WideAttention(TorchFunctionMode):
    """Attention in float32 under autocast: in bfloat16 its backward pass is four times as slow on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(x.float() for x in args), **(kwargs or {}))


class Training(ABC):
    """Model, moving average, optimisers, step. What a step does depends on these and the options alone."""

    def __init__(self, options: argparse.Namespace, build: Callable[[], Any], blocks: str) -> None:
        """`build` makes a model; `blocks` is the name of its list of layers."""
        torch.manual_seed(options.seed)
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build().to(self.device)
        self.average = build().to(self.device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.called: Any = torch.compile(self.model) if options.compile else self.model
        self.step = self.first = options.first
        # Muon is for the matrices between the residual streams; all else, and the two ends, go by AdamW.
        named = list(self.model.named_parameters())
        inner = [p for name, p in named if p.ndim == 2 and name.startswith(f"{blocks}.") and "norm" not in name]
        chosen = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in chosen]
        self.optimisers = [
            torch.optim.Muon(inner, lr=options.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    @abstractmethod
    def losses(self) -> dict[str, Tensor]:
        """Of this step's batch, by part."""

    @abstractmethod
    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """What is minimised."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Of the model, for whoever opens a checkpoint."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the moving average as a pipeline."""

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast to bfloat16 where it was asked for."""
        wide = WideAttention() if self.options.bf16 and self.device.type == "cpu" else nullcontext()
        with wide, torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            yield

    def rate(self) -> float:
        """Share of the full learning rate at this step."""
        left = (self.options.steps - self.step) / max(1, self.options.decay)
        return min(1.0, (self.step - self.first + 1) / self.options.warmup, left)

    def advance(self) -> dict[str, float]:
        """One step; its losses."""
        losses = self.losses()
        total = self.total(losses)
        total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.options.rate * self.rate()
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        # A moving average over a tenth of what was trained so far, at most over `--average` steps.
        keep = min(1 - 1 / self.options.average, 1 - 10 / (self.step - self.first + 10))
        for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - keep)
        return {"loss": float(total.detach()), "norm": float(norm), **{k: float(v.detach()) for k, v in losses.items()}}

    def save(self, path: Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        state = {
            "step": self.step,
            "first": self.first,
            "sizes": self.sizes(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        """Takes up a checkpoint."""
        state = torch.load(path, map_location=self.device)
        self.step, self.first = state["step"], state.get("first", 0)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, of in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(of)


def add_options(parser: argparse.ArgumentParser, *, steps: int, decay: int, rate: float, layers: int) -> None:
    """The options that every training has, with a model's defaults."""
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of checkpoint and log; taken up if there is one"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="number of a new run's first step: steps before it are spent"
    )
    parser.add_argument("--steps", type=int, default=steps, help="in all, those before a resumption counted in")
    parser.add_argument("--decay", type=int, default=decay, help="last steps, over which the learning rate falls to 0")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=rate, help="learning rate")
    parser.add_argument("--average", type=int, default=150, help="steps that the moving average spans")
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--heads", type=int, default=4, help="of 32 channels each")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--export", type=Path, help="folder for the moving average as a pipeline, in float16")
    parser.add_argument("--until", type=float, help="stop (and save) at this Unix time")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses steps that do not fit."""
    if not 0 <= options.first < options.steps:
        parser.error(
            f"--first {options.first}: it must be at least 0 and below --steps {options.steps}, which counts from 0 too"
        )


def train(training: Training) -> None:
    """Trains, or goes on training from the checkpoint of the run's folder."""
    options = training.options
    options.run.mkdir(parents=True, exist_ok=True)
    checkpoint = options.run / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {training.device}, from step {training.step}")
    bar = tqdm(total=options.steps, initial=training.step, desc="training", mininterval=5)
    with (options.run / "losses.jsonl").open("a") as log:
        while training.step < options.steps and (options.until is None or time.time() < options.until):
            losses = training.advance()
            log.write(json.dumps({"step": training.step, **losses}) + "\n")
            log.flush()
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()}, refresh=False)
            if training.step % options.save_every == 0 or training.step == options.steps:
                training.save(checkpoint)
    training.save(checkpoint)
    bar.close()
    if options.export:
        training.export(options.export)
