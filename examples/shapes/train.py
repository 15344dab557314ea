"""Trains the model of moving shapes by flow matching. Stops and resumes anywhere: the weights that result are the same.

    python examples/shapes/train.py --run RUN --export examples/shapes/weights

Each step draws fresh clips by number, so that none comes twice. A new run first fits the autoencoder to training clips.
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
from shapes.autoencoder import PatchAutoencoder, fit_autoencoder
from shapes.clips import TRAINING, make_clips, no_text
from shapes.model import SHIFT, shapes_scheduler, shapes_transformer
from shapes.pipeline import ShapesPipeline

MOST = 2**12
"""Largest batch: step s has the training clips from `s * MOST` on, so that none comes twice, also where the batch changes."""
NULL = 0.1
"""Share of the clips that are trained without words."""


class Training(_training.Training):
    """Of the model of moving shapes."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options, lambda: shapes_transformer(options.layers, options.heads), "blocks")
        # Fitted once: on another machine components of nearly equal variance may come out in another order.
        fitted = options.run / "vae"
        if not fitted.exists():
            fit_autoencoder().save_pretrained(fitted)
        self.vae = PatchAutoencoder.from_pretrained(fitted).to(self.device)

    def losses(self) -> dict[str, Tensor]:
        """Squared error of the velocity on this step's clips."""
        count = self.options.batch
        first = TRAINING + self.step * MOST
        clips = make_clips(range(first, first + count))
        generator = torch.Generator().manual_seed(self.step)
        told = torch.rand(count, generator=generator)[:, None, None] >= NULL
        text = torch.where(told, clips.text, no_text(count)).to(self.device)
        clean = self.vae.encode(clips.video.to(self.device))
        # Evenly spread over the trajectory, as it is sampled: less noise in the loss than with independent ones.
        left = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        sigma = (SHIFT * left / (1 + (SHIFT - 1) * left)).to(self.device)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        share = sigma[:, None, None, None, None]
        with self.precision():
            velocity = self.called(
                hidden_states=(1 - share) * clean + share * noise,
                timestep=1000 * sigma,
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
        return {"velocity": (velocity.float() - (noise - clean)).square().mean()}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """There is one loss."""
        return losses["velocity"]

    def sizes(self) -> dict[str, int]:
        """Layers and heads."""
        return {"layers": self.options.layers, "heads": self.options.heads}

    def export(self, folder: Path) -> None:
        """Writes the moving average as a pipeline: float16 safetensors, configuration, scheduler and autoencoder."""
        transformer = shapes_transformer(self.options.layers, self.options.heads)
        transformer.load_state_dict(self.average.state_dict())
        ShapesPipeline(transformer.half(), shapes_scheduler(), self.vae.cpu()).save_pretrained(folder)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _training.add_options(parser, steps=600, decay=300, rate=4e-3, layers=6)
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
