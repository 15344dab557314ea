"""What a sceptic would name: other solvers at equal evaluations, other schedules at equal full steps, and cache-dit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

import hero_fx
from _fidelity_settings import Setting

__all__ = ["CACHE_DIT", "SOLVERS", "cache_dit_on", "even", "growing", "random_schedule", "rivals", "solver"]

CACHE_DIT = "cache-dit F1B0 + TaylorSeer 1"
SOLVERS = {"dpm++": "DPM-Solver++ 2M", "unipc": "UniPC"}
"""Names of `Setting.solver`, and what people call them."""


def solver(name: str, usual: Any) -> Any:
    """A scheduler of diffusers for the same noise levels and prediction as `usual`, of second order.

    CogVideoX shifts its noise levels, which other schedulers of diffusers do not know: they get the shifted ones as betas. The
    last level, where nothing but noise is left, is theirs for it, 2^-24.
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kept = usual.alphas_cumprod.double().clamp(min=2**-24)
    betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
    kinds = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
    return kinds[name].from_config(
        usual.config,
        solver_order=2,
        timestep_spacing="trailing",
        trained_betas=betas.tolist(),
        rescale_betas_zero_snr=False,
    )


def even(steps: int, interval: int) -> tuple[bool, ...]:
    """HERO's schedule: the first three steps, the last one, and every `interval`-th between."""
    schedule = hero_fx.Config(interval=interval, num_steps=steps).make_schedule()
    return tuple(map(schedule.is_full, range(steps)))


def growing(steps: int, full: int) -> tuple[bool, ...]:
    """`full` full steps whose distances grow along the trajectory, as the square of their number."""
    chosen: list[int] = []
    for k in range(full):
        place = round((steps - 1) * (k / max(1, full - 1)) ** 2)
        chosen.append(min(max(place, chosen[-1] + 1 if chosen else 0), steps - full + k))
    return tuple(step in chosen for step in range(steps))


def random_schedule(steps: int, full: int, seed: int) -> tuple[bool, ...]:
    """`full` full steps: the first one and others drawn from a seed."""
    chosen = {0, *random.Random(seed).sample(range(1, steps), full - 1)}
    return tuple(step in chosen for step in range(steps))


def rivals(interval: int, steps: int, cache_dit: bool) -> list[Setting]:
    """The rivals of HERO with a full step every `interval` of `steps`; solvers evaluate the model once for each full step."""
    mask = even(steps, interval)
    full = sum(mask)
    found = [Setting(f"{title}, {full} steps", steps=full, solver=name) for name, title in SOLVERS.items()]
    found.append(Setting(f"growing window, N={interval}", {"schedule": growing(steps, full)}))
    found += [
        Setting(f"random schedule {seed}, N={interval}", {"schedule": random_schedule(steps, full, seed)})
        for seed in range(3)
    ]
    if cache_dit:
        found.append(Setting(f"{CACHE_DIT}, N={interval}", cache_dit=mask))
    return found


def cache_dit_on(transformer: Any, mask: Sequence[bool]) -> Callable[[], None]:
    """Switches cache-dit on: the first block computed at every step, the others extrapolated where `mask` is false.

    Returns:
        What starts a trajectory.

    Raises:
        ModuleNotFoundError: cache-dit is not installed.
    """
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=0,
        steps_computation_mask=[int(full) for full in mask],
        steps_computation_policy="static",
        num_inference_steps=len(mask),
    )
    adapter = cache_dit.BlockAdapter(
        transformer=transformer,
        blocks=transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_0,
    )
    cache_dit.enable_cache(
        adapter, cache_config=config, calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    )
    return lambda: cache_dit.refresh_context(transformer, num_inference_steps=len(mask))
