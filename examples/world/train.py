"""Trains the world model. Stops and resumes anywhere: the weights that result are the same.

    python examples/world/train.py --run RUN --size 16 --batch 32 --steps 600 --decay 0            # a cheap start
    python examples/world/train.py --run RUN --steps 3000 --decay 600 --export examples/world/weights

    python examples/world/train.py --run RUN --weights examples/world/weights --first 7600 --steps 9000            # more

With `--bf16 --compile` a step takes little more than half the time on a CPU that has matrix units for bfloat16; `--planning 7`
gives planning, the harder task, more of each batch. The shipped weights were trained so in the end, up to step 7,600: `--first`
keeps a new run from scenes that they have seen.

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
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import _training
from world.latents import FOLD, MODALITIES, condition, encode
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
WEIGHTS = {"rgb": 2.0, "disparity": 1.0, "raymap": 2.0}
NULL, GOAL = 0.08, 0.06
"""Shares of the planning clips that are trained without any condition, and without the last frame."""


class Training(_training.Training):
    """Of the world model."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options, lambda: world_transformer(options.layers, options.heads), "transformer_blocks")
        if options.weights:
            weights = WorldModelPipeline.from_pretrained(options.weights).transformer.state_dict()
            self.model.load_state_dict(weights)
            self.average.load_state_dict(weights)
        self.rotary = rotary(self.model, FRAMES, options.size // FOLD, options.size // FOLD)
        self.alphas = world_scheduler().alphas_cumprod.float().to(self.device)

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
        with self.precision():
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

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted mean over modalities."""
        return sum((WEIGHTS[name] * loss for name, loss in losses.items()), torch.zeros(())) / sum(WEIGHTS.values())

    def sizes(self) -> dict[str, int]:
        """Layers and heads."""
        return {"layers": self.options.layers, "heads": self.options.heads}

    def export(self, folder: Path) -> None:
        """Writes the moving average as a pipeline: float16 safetensors, configuration and scheduler."""
        transformer = world_transformer(self.options.layers, self.options.heads)
        transformer.load_state_dict(self.average.state_dict())
        WorldModelPipeline(transformer.half(), world_scheduler()).save_pretrained(folder)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _training.add_options(parser, steps=2500, decay=500, rate=2e-3, layers=16)
    parser.add_argument("--weights", type=Path, help="exported weights that a new run starts from")
    parser.add_argument(
        "--planning", type=int, default=1, help="clips of planning in a batch for each one of reconstruction"
    )
    parser.add_argument(
        "--size", type=int, default=SIZE, help="side of the images in pixels; smaller ones are a cheap start"
    )
    options = parser.parse_args(argv)
    _training.check_options(parser, options)
    return options


def main(argv: list[str] | None = None) -> Training:
    """Trains, or goes on training."""
    run = Training(parse(argv))
    _training.train(run)
    return run


if __name__ == "__main__":
    main()
