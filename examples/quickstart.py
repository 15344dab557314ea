"""An Aether-shaped world model, denoised with plain torch.compile and with hero_fx: a table and a picture.

    python examples/quickstart.py

The model has Aether's layout at a size for a CPU: a CogVideoX transformer whose latents are RGB, disparity and camera
raymap concatenated on channels, conditioned on further channels, guided by a batch of two (with and without text), 50 DDIM
steps. Its weights are random, so what it "imagines" is no video: the point here is the same result in less time.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import hero_fx
from _model import CONDITION, LATENT, RGB, Setting, rotary, world_model

GUIDANCE = 3.0


@dataclass
class Run:
    """One denoised trajectory."""

    latents: Tensor
    """[1, frames, LATENT, height, width]"""
    seconds: list[float]
    """Of each step."""


def denoise(model: Any, inputs: dict[str, Any], num_steps: int, label: str) -> Run:
    """A plain DDIM loop with classifier-free guidance; nothing in it knows of hero_fx."""
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(1)
    frames, height, width = inputs["size"]
    latents = torch.randn(1, frames, LATENT, height, width, generator=generator)
    seconds = []
    for t in tqdm(scheduler.timesteps, desc=label):
        start = time.perf_counter()
        pair = torch.cat([latents, inputs["condition"]], dim=2).expand(2, -1, -1, -1, -1)
        velocity = model(
            hidden_states=pair.contiguous(),
            encoder_hidden_states=inputs["text"],
            timestep=t.expand(2),
            image_rotary_emb=inputs["rotary"],
            return_dict=False,
        )[0]
        seconds.append(time.perf_counter() - start)
        without, with_text = velocity.chunk(2)
        latents = scheduler.step(without + GUIDANCE * (with_text - without), t, latents)[0]
    return Run(latents, seconds)


def compile_and_denoise(model: Any, backend: Any, inputs: dict[str, Any], num_steps: int, label: str) -> Run:
    """Compiles on a first call, which is not timed, then denoises."""
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    print(f"{label}: compiling ...", flush=True)
    start = time.perf_counter()
    compiled(
        hidden_states=torch.cat([inputs["noise"], inputs["condition"]], dim=2).expand(2, -1, -1, -1, -1).contiguous(),
        encoder_hidden_states=inputs["text"],
        timestep=torch.tensor(999).expand(2),
        image_rotary_emb=inputs["rotary"],
        return_dict=False,
    )
    print(f"{label}: first call took {time.perf_counter() - start:.0f} s", flush=True)
    hero_fx.reset()
    return denoise(compiled, inputs, num_steps, label)


def report(plain: Run, fast: Run, backend: hero_fx.Backend, num_steps: int) -> str:
    """The table."""
    steps, config = backend.graphs[-1], backend.config
    policy = config.make_policy()
    assert policy is not None
    kinds = hero_fx.step_kinds(config, policy, num_steps)
    full_s = median(s for s, kind in zip(fast.seconds, kinds, strict=True) if kind is None)
    cached = [s for s, kind in zip(fast.seconds, kinds, strict=True) if kind is not None]
    gemm_plain = hero_fx.flops(steps.normal) * num_steps
    gemm_fast = hero_fx.trajectory_flops(steps, config, num_steps)
    by_medians = kinds.count(None) * full_s + len(cached) * (median(cached) if cached else 0.0)
    error = fast.latents - plain.latents
    relative = float(error.norm() / plain.latents.norm())
    span = float(plain.latents.max() - plain.latents.min())
    psnr = 10 * torch.log10(span**2 / error.square().mean()).item()
    rows = [
        ["full + cached steps", f"{num_steps} + 0", f"{kinds.count(None)} + {len(cached)}"],
        ["seconds per full step (median)", f"{median(plain.seconds):.3f}", f"{full_s:.3f}"],
        ["seconds per cached step (median)", "", f"{median(cached):.3f}" if cached else ""],
        ["seconds per trajectory", f"{sum(plain.seconds):.1f}", f"{sum(fast.seconds):.1f}"],
        ["speed-up of the trajectory", "1.00", f"{sum(plain.seconds) / sum(fast.seconds):.2f}"],
        ["speed-up by the medians", "1.00", f"{num_steps * median(plain.seconds) / by_medians:.2f}"],
        ["speed-up that the FLOPs with attention allow", "1.00", f"{gemm_plain.total / gemm_fast.total:.2f}"],
        ["GEMM TFLOPs", f"{gemm_plain.gemm / 1e12:.3f}", f"{gemm_fast.gemm / 1e12:.3f}"],
        ["feature state, MB", "0", f"{backend.stats().state_bytes / 1e6:.1f}"],
        ["relative L2 to full compute", "0", f"{relative:.4f}"],
        ["PSNR to full compute, dB", "", f"{psnr:.1f}"],
    ]
    return tabulate(rows, headers=["", "torch.compile", "hero_fx"], disable_numparse=True, stralign="right")


def picture(plain: Run, fast: Run, path: Path) -> None:
    """Frames side by side: RGB and disparity latents under full compute, under hero_fx, and their difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    frames = plain.latents.shape[1]
    rows = (("RGB latent", slice(0, 3), None), ("disparity latent", slice(RGB, RGB + 1), "magma"))
    figure, axes = plt.subplots(3 * len(rows), frames, figsize=(2.1 * frames, 1.5 * 3 * len(rows)), layout="compressed")
    for r, (name, channels, colours) in enumerate(rows):
        full, ours = (run.latents[0, :, channels].permute(0, 2, 3, 1) for run in (plain, fast))
        low, high = full.quantile(0.01), full.quantile(0.99)
        difference = (ours - full).abs().mean(dim=-1)
        for f in range(frames):
            for k, image in enumerate((full[f], ours[f])):
                axes[3 * r + k, f].imshow(
                    ((image - low) / (high - low)).clamp(0, 1).numpy(), cmap=colours, vmin=0, vmax=1
                )
            shown = axes[3 * r + 2, f].imshow(difference[f].numpy(), cmap="gray", vmin=0, vmax=float(difference.max()))
        labels = (f"{name}\ntorch.compile", f"{name}\nhero_fx", "|difference|")
        for k, label in enumerate(labels):
            axes[3 * r + k, 0].set_ylabel(label, fontsize=8)
        bar = figure.colorbar(shown, ax=axes[3 * r + 2, :].tolist(), fraction=0.02)
        bar.set_label(f"of a range of {float(high - low):.1f}", fontsize=8)
    for f in range(frames):
        axes[0, f].set_title(f"frame {f}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Denoises twice, prints the table, saves the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--interval", type=int, default=2, help="N: a full step every N steps")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6, help="of 64 channels each")
    parser.add_argument("--size", type=int, nargs=3, default=(5, 24, 36), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"))
    arguments = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    frames, height, width = arguments.size
    setting = Setting(arguments.layers, arguments.heads, (frames, height, width))
    model = world_model(setting)
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "size": (frames, height, width),
        "noise": torch.randn(1, frames, LATENT, height, width, generator=generator),
        "condition": torch.randn(1, frames, CONDITION, height, width, generator=generator),
        "text": torch.randn(2, *setting.text, generator=generator),
        "rotary": rotary(setting),
    }
    print(f"{setting}, {arguments.steps} DDIM steps, {torch.get_num_threads()} threads")
    plain_backend = arguments.inner if arguments.inner == "inductor" else "eager"
    plain = compile_and_denoise(model, plain_backend, inputs, arguments.steps, "torch.compile")
    backend = hero_fx.backend(interval=arguments.interval, num_steps=arguments.steps, inner=arguments.inner)
    fast = compile_and_denoise(model, backend, inputs, arguments.steps, "hero_fx")
    print("\n" + report(plain, fast, backend, arguments.steps))
    picture(plain, fast, arguments.picture)
    print(f"\nframes side by side: {arguments.picture}")


if __name__ == "__main__":
    main()
