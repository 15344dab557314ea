"""Trains the world model. Stops and resumes anywhere: the weights that result are the same.

    python examples/world/train.py --run RUN --size 16 --batch 32 --steps 600 --decay 0            # a cheap start
    python examples/world/train.py --run RUN --steps 3000 --decay 600 --export examples/world/weights

    python examples/world/train.py --run RUN --weights examples/world/weights --first 3000 --steps 5000            # more

Planning is trained on straight camera paths: its end frames do not tell how a path bows between them, and a model that draws
a bow at random is further from the truth than one that draws none (`evaluate.py` prints both). Reconstruction, which sees all
frames, is trained on the paths as they are.

Each step draws fresh scenes by number, so that none comes twice; a checkpoint holds weights, moving average, optimisers and
step, and what a step does depends on these and the options alone. A run goes on with whatever options it is resumed with:
coarse images first, then whole ones; and the learning rate falls linearly over the last `--decay` of `--steps` steps, so
that a run is wound down at any time by naming the step to end at.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from world.latents import FOLD, LATENT, MODALITIES, condition, encode
from world.model import FRAMES, SIZE, TASKS, rotary, task_text, world_scheduler, world_transformer
from world.pipeline import WorldModelPipeline
from world.render import render
from world.scenes import TRAINING, sample_scenes, straightened

GAMMA = 5.0
"""Loss weights of the clean latents' error stop growing with the signal-to-noise ratio here (min-SNR, Hang et al. 2023)."""
MOST = 2**12
"""Largest batch: step s has the training scenes from `s * MOST` on, so that none comes twice, also where the batch changes."""
NOISY = (0.25, 0.15)
"""A share of the clips is trained at a share of the timesteps, the noisiest. There alone must the conditions tell camera and
depth; with less noise the noisy latents do."""
WEIGHTS = {"rgb": 1.0, "disparity": 1.0, "raymap": 2.0}
NULL, GOAL = 0.08, 0.06
"""Shares of the planning clips that are trained without any condition, and without the last frame."""


class WideAttention(TorchFunctionMode):
    """Attention in float32 under autocast: in bfloat16 its backward pass is four times as slow on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(x.float() for x in args), **(kwargs or {}))


class Training:
    """Model, moving average, optimisers, step."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = world_transformer(options.layers, options.heads).to(self.device)
        self.average = world_transformer(options.layers, options.heads).to(self.device).requires_grad_(False)
        if options.weights:
            weights = WorldModelPipeline.from_pretrained(options.weights).transformer.state_dict()
            self.model.load_state_dict(weights)
        self.average.load_state_dict(self.model.state_dict())
        self.called: Any = torch.compile(self.model) if options.compile else self.model
        self.rotary = rotary(self.model, FRAMES, options.size // FOLD, options.size // FOLD)
        self.alphas = world_scheduler().alphas_cumprod.float().to(self.device)
        self.step = self.first = options.first
        # Muon is for the matrices between the residual streams; all else, and the two ends, go by AdamW.
        named = list(self.model.named_parameters())
        inner = [p for name, p in named if p.ndim == 2 and name.startswith("transformer_blocks") and "norm" not in name]
        chosen = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in chosen]
        self.optimisers = [
            torch.optim.Muon(inner, lr=options.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, condition and text of this step's scenes."""
        count = self.options.batch
        first = TRAINING + self.step * MOST
        plans = torch.arange(count) % (self.options.planning + 1) < self.options.planning
        # The end frames do not tell how a path bows between them. A plan is the straight one, in the middle of all.
        scenes = straightened(sample_scenes(range(first, first + count)), plans)
        clips = render(scenes.to(self.device), size=self.options.size)
        generator = torch.Generator().manual_seed(self.step)
        given = torch.ones(count, FRAMES, dtype=torch.bool)
        tasks: list[str | None] = [TASKS[1]] * count
        for row, chance in enumerate(torch.rand(count, generator=generator).tolist()):
            if not plans[row]:
                continue
            tasks[row], given[row, 1:-1] = TASKS[0], False
            if chance < NULL + GOAL:
                tasks[row], given[row, -1] = None, False
                given[row, 0] = chance >= NULL
        text = task_text(tasks).to(self.device)
        return encode(clips), condition(clips.rgb, given.to(self.device)), text

    def losses(self) -> dict[str, Tensor]:
        """Weighted squared error of the velocity, by modality, on this step's scenes."""
        clean, given, text = self.batch()
        generator = torch.Generator().manual_seed(2**31 + self.step)
        count = len(clean)
        # Evenly spread timesteps: less noise in the loss than with independent ones. Shuffled, for tasks alternate.
        spread = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        late, early = NOISY[1] * spread / NOISY[0], (spread - NOISY[0]) / (1 - NOISY[0])
        timestep = (999.99 * torch.where(spread < NOISY[0], 1 - late, early)).long().to(self.device)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        signal = self.alphas[timestep]
        a, b = (x.sqrt()[:, None, None, None, None] for x in (signal, 1 - signal))
        noisy, target = a * clean + b * noise, a * noise - b * clean
        wide = WideAttention() if self.options.bf16 and self.device.type == "cpu" else nullcontext()
        with wide, torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            velocity = self.called(
                hidden_states=torch.cat([noisy, given], dim=2),
                encoder_hidden_states=text,
                timestep=timestep,
                image_rotary_emb=self.rotary,
                return_dict=False,
            )[0]
        # An error of the velocity is one of the clean latents times 1 / b, so b**2 turns the weight of one into the other's.
        ratio = signal / (1 - signal)
        weight = (1 - signal) * (ratio + 1).clamp(max=GAMMA)
        error = (velocity.float() - target).square() * weight[:, None, None, None, None]
        return {name: error[:, :, channels].mean() for name, channels in MODALITIES.items()}

    def rate(self) -> float:
        """Share of the full learning rate at this step."""
        left = (self.options.steps - self.step) / max(1, self.options.decay)
        return min(1.0, (self.step - self.first + 1) / self.options.warmup, left)

    def advance(self) -> dict[str, float]:
        """One step; its losses."""
        losses = self.losses()
        total = sum(WEIGHTS[name] * loss for name, loss in losses.items()) / sum(WEIGHTS.values())
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
            "sizes": {"layers": self.options.layers, "heads": self.options.heads},
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

    def export(self, folder: Path) -> None:
        """Writes the moving average as a pipeline: float16 safetensors, configuration and scheduler."""
        transformer = world_transformer(self.options.layers, self.options.heads)
        transformer.load_state_dict(self.average.state_dict())
        WorldModelPipeline(transformer.half(), world_scheduler()).save_pretrained(folder)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of checkpoint and log; taken up if there is one"
    )
    parser.add_argument("--weights", type=Path, help="exported weights that a new run starts from")
    parser.add_argument(
        "--first", type=int, default=0, help="number of a new run's first step: steps before it are spent"
    )
    parser.add_argument("--steps", type=int, default=2500, help="in all, those before a resumption counted in")
    parser.add_argument("--decay", type=int, default=500, help="last steps, over which the learning rate falls to 0")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--planning", type=int, default=1, help="clips of planning in a batch for each one of reconstruction"
    )
    parser.add_argument(
        "--size", type=int, default=SIZE, help="side of the images in pixels; smaller ones are a cheap start"
    )
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--average", type=int, default=150, help="steps that the moving average spans")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=4, help="of 32 channels each")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--export", type=Path, help="folder for the moving average as a pipeline, in float16")
    parser.add_argument("--until", type=float, help="stop (and save) at this Unix time")
    options = parser.parse_args(argv)
    if not 0 <= options.first < options.steps:
        parser.error(
            f"--first {options.first}: it must be at least 0 and below --steps {options.steps}, which counts from 0 too"
        )
    return options


def main(argv: list[str] | None = None) -> Training:
    """Trains, or goes on training."""
    options = parse(argv)
    options.run.mkdir(parents=True, exist_ok=True)
    training, checkpoint = Training(options), options.run / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {LATENT} channels, {training.device}, from step {training.step}")
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
    return training


if __name__ == "__main__":
    main()
