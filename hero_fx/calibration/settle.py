"""What is settled before anything is searched: the recordings, the parts of the batch, the schedule to start with."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from tqdm import tqdm

from hero_fx.arguments import is_number
from hero_fx.plan import Plan

from .evaluate import Job
from .record import Recording
from .search import Schedule

__all__ = ["measured", "parts_of", "record", "start_of", "weights_of"]

log = logging.getLogger(__name__)


def record(job: Job, num_steps: int) -> None:
    """Runs all trajectories in full.

    Raises:
        ValueError: they are not as many, as long, or at the timesteps, as was said.
    """
    compiled = torch.compile(job.model, backend=job.recorder, fullgraph=True)
    first: Recording | None = None
    for i in tqdm((*job.scenes, *job.holdout), desc="recording", unit="trajectory"):
        job.finals[i] = job.run(compiled, i)
        made = job.recorder.finish()
        if lengths := [len(r.timesteps) for r in made if len(r.timesteps) != num_steps]:
            raise ValueError(f"num_steps={num_steps}, but run(model, {i}) made {lengths[0]} steps: make both agree")
        if len(made) < len(job.recordings):
            raise ValueError(
                f"phases={len(job.recordings)}, but run(model, {i}) made {len(made)} trajectories, one after another: there "
                "must be one for each phase"
            )
        first = first or made[0]
        if any(recording.timesteps != first.timesteps for recording in made):
            raise ValueError(f"run(model, {i}) went through other timesteps than the first trajectory")
        for number, recording in enumerate(made if i in job.scenes else ()):
            job.recordings[min(number, len(job.recordings) - 1)].append(recording)
    for rule in job.recorder.rules:
        if rule.latent is None:
            log.warning(
                "output %d: no argument holds its noisy latent in channels that change together from step to step, so it is "
                "forecast from past outputs alone; name the argument with latent=", rule.index,
            )  # fmt: skip


def parts_of(job: Job) -> int:
    """Parts of the batch that may have full steps of their own: as many as it has rows per sample."""
    recorder = job.recorder
    if recorder.batch < 2 or next(iter(job.recordings[0][0].outputs.values())).shape[0] > 1:
        raise ValueError(
            f"apart=True: the model is called {'several times a step' if recorder.batch > 1 else 'with a batch of 1'}, and "
            "only parts of one batch can have full steps of their own: leave it out, or put guidance into the batch"
        )
    return recorder.batch


def start_of(job: Job, plan: Plan, budget: int | float | None) -> Schedule:
    """The schedule of a plan, of all phases in a row."""
    steps, phases = len(job.timesteps), len(job.recordings)
    lines = [line for phase in range(plan.phases) for line in plan.fitting(steps, phase)]
    if plan.parts != job.parts or len(lines) != phases:
        raise ValueError(
            f"start: the plan has {plan.parts} part(s) of the batch with full steps of their own and {len(lines)} phase(s) of "
            f"{steps} steps, and the calibration is for {job.parts} and {phases}: give another plan, or the same apart= and "
            "phases="
        )
    full = {sum(line.levels) / plan.parts for line in lines}
    if isinstance(budget, int) and full != {budget}:
        raise ValueError(
            f"start: the plan has {max(full):g} full steps, and budget={budget} asks for others: make both agree"
        )
    return sum((line.levels for line in lines), ())


def measured(job: Job) -> Mapping[str, float]:
    """The distances, as they are between two samples."""
    return job.distances(job.finals[job.scenes[0]], job.finals[job.holdout[0]])


def weights_of(weights: Mapping[str, float], names: Mapping[str, float]) -> Mapping[str, float]:
    """The weights of distances; `names`: distances as they are measured.

    Raises:
        ValueError: one is of a distance that is not measured, or is no number above 0.
    """
    for name, weight in weights.items():
        if name not in names or not is_number(weight) or not 0 < weight < math.inf:
            raise ValueError(
                f"weights={dict(weights)!r}: {name!r} must be one of {', '.join(map(repr, names))}, and its weight a "
                "number above 0"
            )
    return weights
