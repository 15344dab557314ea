"""`hero_fx.calibrate`: records a model, fits every candidate, searches its schedule, and returns the best plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from hero_fx import dynamo
from hero_fx.backends import backend
from hero_fx.fingerprint import fingerprint_of
from hero_fx.flops import flops
from hero_fx.passes.emit import value_of
from hero_fx.passes.rewrite.forecast import outputs_of
from hero_fx.plan import Plan, as_plan

from .arguments import check, numbers_of
from .choose import Bound, OutOfBound, best, bound_of, fewest
from .evaluate import Distances, Evaluator, Job, Run, Store, log_sum, plan_for
from .followed import Followed, refine
from .record import Recorder
from .report import Calibration, Candidate, Tried
from .settle import measured, parts_of, record, start_of, weights_of
from .tables import Features, Outputs, Predictor, by_parts

__all__ = ["calibrate", "relative_l2"]

log = logging.getLogger(__name__)

OPTIONS: dict[str, dict[str, Any]] = {
    "hero": {"cache_point": "post_gate", "unsampled": "extrapolate"},
    "taylorseer": {"cache_point": "post_gate"},
    "lean": {},
}
"""By policy, the options under which caches are behind the gates and merge, so that few coefficients say it all."""
FEW = 8
"""Steps up to which caching has little to gain."""
_FEW = (
    "with so few steps outputs differ much from step to step, and caching gains little (1.1 to 1.3 times): see what is lost "
    "before you use this plan"
)


def relative_l2(sample: Any, reference: Any) -> dict[str, float]:
    """The relative L2 distance of a sample to a reference; one figure per tensor of a tuple, list or dict."""
    pairs = (
        [(str(name), sample[name], reference[name]) for name in reference]
        if isinstance(reference, Mapping)
        else [(f"sample {i}", a, b) for i, (a, b) in enumerate(zip(sample, reference, strict=True))]
        if isinstance(reference, (tuple, list))
        else [("sample", sample, reference)]
    )
    return {name: float((a.float() - b.float()).norm() / b.float().norm()) for name, a, b in pairs}


def calibrate(
    model: Any,
    run: Run,
    *,
    num_steps: int,
    budget: int | float | None = None,
    max_error: float | Mapping[str, float] | None = None,
    scenes: int | Sequence[int] = 4,
    holdout: int | Sequence[int] = 2,
    policies: Sequence[str] = ("forecast",),
    seed: int = 0,
    search: int = 60,
    full_steps: Collection[int] = (),
    phases: int = 1,
    latent: str | Sequence[str] | None = None,
    by: Collection[Literal["frames", "batch"]] = (),
    apart: bool = False,
    start: Plan | str | Path | None = None,
    history: int = 3,
    closed_loop: int = 1,
    distances: Distances = relative_l2,
    weights: Mapping[str, float] | None = None,
    samples: int = 2048,
    folder: str | Path | None = None,
    inner: Any = "inductor",
    timestep: str | int | None = None,
) -> Calibration:
    """Learns a plan from a few trajectories of full compute.

    ::

        def run(model, i):
            pipe.transformer = model
            return pipe(prompts[i], generator=torch.Generator().manual_seed(i), output_type="latent").frames


        found = hero_fx.calibrate(pipe.transformer, run, num_steps=50, budget=2.5)
        print(found)
        found.plan.save("plan.safetensors")

    Every trajectory runs once in full and is kept as inner products; all least-squares problems are solved from these. The
    schedule starts from dynamic programming on one-step errors and is improved by running it: what counts is the distance of
    the final sample to full compute. The same seed gives the same plan.

    Args:
        model: the module to be compiled, in eval mode.
        run: makes trajectory i with the model it is given, from the same noise each time, and returns its final sample: a
            tensor, or a tuple, list or dict of them. All calls have the same shapes.
        num_steps: T, the steps of a trajectory, which `run` has to make.
        budget: how much may be computed: a number of full steps (an int), or a speed-up by FLOPs, attention's included (a
            float).
        max_error: in the place of `budget`, how far the final sample may be from full compute's, mean over the fitted
            trajectories: the plan has the fewest full steps that keep within it. A number bounds all distances; a mapping
            those that it names, such as `{"rgb": 0.005}`.
        scenes: the trajectories to fit to, by number; an int n means 0 .. n - 1.
        holdout: those that errors are reported on; an int n means the n that follow.
        policies: the candidates: of `"forecast"`, `"hero"`, `"taylorseer"`, `"lean"`.
        search: how many schedules each candidate may try by running them (with `max_error` at least one for each number of
            full steps that is tried).
        full_steps: steps that must be full, because they have an effect besides their output (they write a KV cache).
        phases: for autoregressive models, whose runs are several trajectories, chunk after chunk: how many of the first have a
            schedule and coefficients of their own. The last of these are fitted to all further ones, and are for them.
        latent: the argument, or arguments, that hold the noisy latent, where the first that fits is not the one.
        by: which parts of an output get coefficients of their own besides its channels: `"frames"`, `"batch"`.
        apart: let the parts of the batch have full steps and coefficients of their own, where guidance puts the unconditional
            and the conditional half into one call: for policy `"forecast"`, and models whose rows of the batch do not meet.
            Each part then runs by itself. It gains most where guidance is weak at early steps (CogVideoX's dynamic form).
        start: a plan with as many full steps, whose schedule is tried first; with `search=1` it is kept, and coefficients are
            fitted alone. With `max_error` it is tried where the full steps are as many.
        history: how many past outputs a forecast is made from, 1 to 3.
        closed_loop: how many rounds fit the coefficients of the schedule again, to trajectories that follow the plan, so that
            every cached step leads back to full compute; 0: none. A round runs all fitted trajectories. Outputs without a
            noisy latent keep their coefficients.
        distances: (sample, full compute's) -> distances by name, all above 0 unless equal; by default relative L2 norms.
        weights: by name, how much the logarithm of a distance counts where schedules and candidates are compared; 1 where
            nothing is said.
        samples: positions of an output, per frame and row of the batch, that are recorded.
        folder: where evaluations are kept, so that a run that is cut off goes on.
        inner, timestep: as in `hero_fx.backend`.

    Returns:
        The best plan and what was compared; print it, and `.plot(path)` draws it.

    Raises:
        ValueError: an argument is out of range, the trajectories are not `num_steps` steps long, or no candidate fits the
            model and the budget; for `max_error`, it says how near the nearest one comes.
    """
    fitted = numbers_of("scenes", scenes, 0)
    held = numbers_of("holdout", holdout, max(fitted) + 1)
    check(
        num_steps, budget, max_error, policies, search, full_steps, fitted, held, history, samples, by, phases, apart,
        closed_loop,
    )  # fmt: skip
    notes = [f"num_steps={num_steps}: {_FEW}"] if num_steps <= FEW else []
    for note in notes:
        log.warning("%s", note)
    tapped = {p: backend(p, **OPTIONS[p], inner=inner, timestep=timestep) for p in policies if p != "forecast"}
    recorder = Recorder(
        tapped, backend("fora", inner=inner, timestep=timestep),
        latent=latent, samples=samples, feature_samples=max(64, samples // 8), seed=seed,
    )  # fmt: skip
    store = Store(None if folder is None else Path(folder) / "evaluations.json")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    options = {"inner": inner, "timestep": timestep}
    job = Job(
        getattr(model, "_orig_mod", model), run, recorder, [[] for _ in range(phases)], {}, fitted, held, distances, options,
        store, seed, search, frozenset({0, *full_steps}), min(2, len(fitted)),
    )  # fmt: skip
    with torch.no_grad(), dynamo.unlimited_tracing(), _forgotten(job.model):
        record(job, num_steps)
        if apart:
            job.parts = parts_of(job)
        if start is not None:
            job.start = start_of(job, as_plan(start), budget)
        job.weights = weights_of(weights or {}, measured(job))
        bound = None if max_error is None else bound_of(max_error, measured(job))
        wanted = budget if bound is None else bound
        assert wanted is not None, "one of the two is given"
        of_policies = [_candidate(job, policy, wanted, by, history, closed_loop) for policy in policies]
    candidates = [candidate for candidate in of_policies if candidate is not None]
    if not candidates:
        why = "; ".join(f"{policy}: {reason}" for policy, reason in recorder.unsupported.items())
        asked = f"budget={budget!r}" if bound is None else f"max_error={max_error!r}"
        raise ValueError(f"policies={tuple(policies)!r}: none of them fits this model and {asked} ({why})")
    # Where the budget is given, the nearest is the best; where the error is, the cheapest.
    candidates.sort(key=lambda c: c.score if bound is None else (-c.speed, c.score))
    if bound is not None and (over := bound.over(candidates[0].error)):
        notes.append(f"on trajectories that were not fitted, {over}: fit more of them, or ask for less")
    return Calibration(
        candidates=tuple(candidates), unsupported=dict(recorder.unsupported), notes=tuple(notes),
        max_error={} if bound is None else bound.limits,
    )  # fmt: skip


@contextmanager
def _forgotten(model: torch.nn.Module) -> Iterator[None]:
    """Leaves no compiled code behind, which would count towards Dynamo's limit for the compile that follows."""
    try:
        yield
    finally:
        dynamo.forget_code(model)


def _candidate(
    job: Job, policy: str, budget: int | float | Bound, by: Collection[str], history: int, closed_loop: int
) -> Candidate | None:
    unsupported = job.recorder.unsupported
    if policy in unsupported:
        return None
    predictors, base = _predictors(job, policy, by, history)
    steps, phases = len(job.timesteps), len(predictors)
    plan = plan_for(job, base, predictors, (job.parts,) * (steps * phases))
    chosen = backend(plan=plan, **job.options)
    followed = Followed(chosen, plan.outputs, job.recorder.nearby())
    compiled = torch.compile(job.model, backend=followed, fullgraph=True)
    job.run_alone(compiled, job.scenes[0])  # compiles: FLOPs are counted from its graphs
    graphs = chosen.graphs[-1]
    plain = max(1, flops(graphs.normal).total)
    share, parts = flops(graphs.cached[0]).total / plain, job.parts
    one = 1.0 if parts == 1 else (flops(graphs.full).total or plain / parts) / plain

    def speed(full: int) -> float:
        return steps / (full * one + (steps * parts - full) * share)

    least = len(job.must) * parts
    evaluate = Evaluator(job, base, predictors, chosen, compiled)
    with tqdm(total=job.evaluations, desc=f"{policy}: schedules", unit="schedule") as job.bar:
        if isinstance(budget, Bound):
            try:
                schedule = fewest(evaluate, budget, least, steps * parts - 1)
            except OutOfBound as missed:
                unsupported[policy] = str(missed)
                return None
        else:
            gain, rest = max(one - share, 1e-9), steps * parts * share
            full = budget * parts if isinstance(budget, int) else math.floor((steps / budget - rest) / gain)
            if full < least:
                unsupported[policy] = (
                    f"budget={budget} leaves room for {max(full, 0) // parts} full steps, where a cached one costs "
                    f"{share * parts:.0%} of a full one, and {least // parts} have to be full"
                )
                return None
            if job.start is not None and sum(job.start) != full * phases:
                raise ValueError(
                    f"start: the plan has {sum(job.start) / parts / phases:g} full steps, and budget={budget} allows "
                    f"{full / parts:g} with policy {policy!r}: make both agree"
                )
            schedule = best(evaluate, full)
    if closed_loop and any(rule.latent is not None for rule in plan.outputs):
        evaluate = refine(evaluate, followed, schedule, closed_loop, _score(job, budget))
    error, full = evaluate.errors(schedule, job.holdout), sum(schedule) // phases
    tried = [Tried(s, sum(s) // phases, e, speed(sum(s) // phases)) for s, e in evaluate.tried.items()]
    return Candidate(
        policy=policy, error=error, speed=speed(full),
        plan=plan_for(job, evaluate.base, evaluate.predictors, schedule, error=error, speed=speed(full)),
        share=share, score=log_sum(error, job.weights), state_bytes=graphs.state_bytes, tried=tuple(tried),
    )  # fmt: skip


def _score(job: Job, budget: int | float | Bound) -> Callable[[Mapping[str, float]], float]:
    """What the coefficients of a schedule are compared by: where there is a bound, none beyond it is better than one within."""

    def score(error: Mapping[str, float]) -> float:
        beyond = isinstance(budget, Bound) and budget.excess(error) > 0
        return math.inf if beyond else log_sum(error, job.weights)

    return score


def _predictors(job: Job, policy: str, by: Collection[str], history: int) -> tuple[list[Predictor], dict[str, Any]]:
    """What fits each phase, and what plans have in common."""
    recorder, recordings = job.recorder, [tuple(of) for of in job.recordings]
    first = recordings[0][0]
    notes = {"fitted to": f"{len(job.scenes)} trajectories", "errors on": f"{len(job.holdout)} others"}
    base: dict[str, Any] = {
        "policy": policy, "model": recorder.fingerprint, "lanes": next(iter(first.outputs.values())).shape[0],
        "batch": recorder.batch, "notes": notes,
    }  # fmt: skip
    if policy == "forecast":
        values = outputs_of(recorder.normal)
        ranks = tuple(value_of(values[rule.index]).dim() for rule in recorder.rules)
        rules = tuple(replace(rule, history=history) for rule in recorder.rules)
        apart = job.parts > 1
        rules = by_parts(rules, ranks, {*by, "batch"} if apart else by, recorder.batch)
        found = [Outputs(of, rules, ranks, apart) for of in recordings]
        base["outputs"] = found[0].ruled()
        base["model"] = fingerprint_of(recorder.normal, recorder.structure, recorder.module, base["outputs"])
        return [*found], base
    base["options"] = OPTIONS[policy]
    base["model"] = replace(recorder.fingerprint, outputs=())
    names = [n.removeprefix(f"{policy}/") for n in first.features if n.startswith(f"{policy}/")]
    refreshed = frozenset(n for n in names if n.startswith(("sum_l0_", "l0_"))) if policy == "hero" else frozenset()
    return [Features(of, policy, 1, refreshed) for of in recordings], base
