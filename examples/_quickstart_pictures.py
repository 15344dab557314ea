"""What the quickstart shows: frames of several scenes side by side, as a picture and moving."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["animate", "picture"]

SCENES = 3
"""Shown at most."""


def picture(worlds: Mapping[str, Any], path: Path, *, given: Collection[int]) -> None:
    """RGB and disparity of the truth and of every way of running the model, frame by frame; how far RGB is from full compute.

    `worlds`: the truth, full compute, then the others: each with `rgb` [B, F, 3, S, S] in [0, 1] and `depth` [B, F, S, S].
    `given`: the frames that the model was given.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(worlds)
    rgb = {name: world.rgb[:SCENES] for name, world in worlds.items()}
    disparity = {name: 1 / world.depth[:SCENES] for name, world in worlds.items()}
    scenes, frames = rgb[names[0]].shape[:2]
    away = {name: (rgb[name] - rgb[names[1]]).abs().mean(dim=2) for name in names[2:]}
    brightest = float(disparity[names[0]].max())
    farthest = max([float(x.max()) for x in away.values()], default=1.0) or 1.0
    rows = [
        *((f"RGB\n{name}", x.movedim(2, -1), None, 1.0) for name, x in rgb.items()),
        *((f"|{name} -\n{names[1]}|\nwhite: {farthest:.1g}", x, "gray", farthest) for name, x in away.items()),
        *((f"disparity\n{name}", x, "magma", brightest) for name, x in disparity.items()),
    ]
    figure, axes = plt.subplots(
        len(rows), scenes * frames, figsize=(0.9 * scenes * frames + 1.4, 0.98 * len(rows)), squeeze=False,
        gridspec_kw={"wspace": 0.04, "hspace": 0.06, "left": 0.075, "right": 0.995, "top": 0.94, "bottom": 0.01},
    )  # fmt: skip
    for line, (label, images, colours, top) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        for k, axis in enumerate(line):
            axis.imshow(images[k // frames, k % frames].numpy(), cmap=colours, vmin=0, vmax=top)
    for k, axis in enumerate(axes[0]):
        scene, frame = divmod(k, frames)
        head = f"scene {scene + 1}, frame" if frame == 0 else ""
        axis.set_title(f"{head}\n{frame}{', given' if frame in given else ''}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def animate(worlds: Mapping[str, Any], path: Path, *, scale: int = 4, milliseconds: int = 250) -> None:
    """The clips as a GIF that runs to and fro: a row for each scene, a column for each of `worlds`, in their order."""
    from PIL import Image, ImageDraw

    grids = torch.stack([world.rgb[:SCENES] for world in worlds.values()], dim=1)  # [scenes, worlds, F, 3, S, S]
    frames = grids.shape[2]
    order = [*range(frames), *range(frames - 2, 0, -1)]
    images = [_sheet(grids[:, :, frame], scale) for frame in order]
    width, top = images[0].shape[1] // len(worlds), 18
    pages = []
    for image in images:
        page = Image.new("RGB", (image.shape[1], image.shape[0] + top), "white")
        page.paste(Image.fromarray(image.numpy()), (0, top))
        for k, name in enumerate(worlds):
            ImageDraw.Draw(page).text((k * width + 4, 3), name, fill="black")
        pages.append(page)
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=milliseconds, loop=0)


def _sheet(images: Tensor, scale: int) -> Tensor:
    """[rows, columns, 3, S, S] in [0, 1] as one image of bytes [height, width, 3], each pixel `scale` times as large."""
    sheet = images.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return (sheet.clamp(0, 1) * 255).round().byte().repeat_interleave(scale, 0).repeat_interleave(scale, 1)
