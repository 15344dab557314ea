"""Runs that follow a plan and are watched, and the rounds in which its coefficients are fitted again to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from tqdm import tqdm

from hero_fx.backends import Backend
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.source import Source

from .closed_loop import refit
from .evaluate import Evaluator
from .samples import Arguments, Calls, Track, Watch
from .search import Schedule
from .solve import Past
from .tables import Outputs, Predictor

__all__ = ["Followed", "refine"]


class Followed:
    """A torch.compile backend that follows a plan and can watch what its calls are given and give."""

    __name__ = "hero_fx_calibration"

    def __init__(self, chosen: Backend, rules: Sequence[OutputRule], watch: Watch) -> None:
        self.chosen, self.rules = chosen, rules
        self.watching = False
        self._watch, self._calls, self._done = watch, Calls(), list[Track]()

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles the model's graph."""
        source, config = Source(gm, inputs), self.chosen.config
        run = self.chosen.compile(source, config)
        arguments = Arguments.of(source.normal(config.disable_passes)[0], config.timestep)
        plain = source.plain.call(lambda *values: values)

        def call(*values: Any) -> Any:
            outputs = run(*values)
            if self.watching:
                own, steps = plain(*values), len(self._calls.times)
                lane, begins = self._calls.of(own[arguments.timestep])
                if begins:
                    self._done.append(self._watch.take(self.rules, steps).cpu())
                self._watch.add(lane, self.rules, outputs, arguments.latents(self.rules, own))
            return outputs

        return call

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watches the calls in its block."""
        self.watching = True
        try:
            yield
        finally:
            self.watching = False

    def finish(self) -> list[Track]:
        """The trajectories that ran since the last call, in order."""
        self._done.append(self._watch.take(self.rules, len(self._calls.times)).cpu())
        self._calls.end()
        done, self._done = self._done, []
        return done


@dataclass(frozen=True, slots=True)
class _Refitted(Predictor):
    """Outputs whose coefficients were fitted again for one schedule."""

    of: Outputs
    found: Mapping[str, Tensor]

    @property
    def parts(self) -> int:
        return self.of.parts

    def part_schedules(self, schedule: Schedule) -> tuple[tuple[bool, ...], ...]:
        return self.of.part_schedules(schedule)

    def errors(self, pasts: Sequence[Past], power: float) -> list[float]:
        return self.of.errors(pasts, power)

    def tables(self, schedule: Schedule) -> dict[str, Tensor]:
        return dict(self.found)


def refine(
    evaluate: Evaluator,
    followed: Followed,
    schedule: Schedule,
    rounds: int,
    score: Callable[[Mapping[str, float]], float],
) -> Evaluator:
    """The same with the best coefficients, by the score on all fitted trajectories: full compute's, or those of a round."""
    job, best, least = evaluate.job, evaluate, math.inf
    with tqdm(total=(rounds + 1) * len(job.scenes), desc="forecast: closed loop", unit="trajectory") as bar:
        now = evaluate
        for turn in range(rounds + 1):
            then = evaluate.refitted(now.predictors, turn + 1)
            known = None if turn == rounds else job.store.tables(then.name(schedule))
            if (known is None and turn < rounds) or not all(now.knows(schedule, i) for i in job.scenes):
                tracks = _tracks(now, followed, schedule, bar)
                if turn < rounds:
                    known = _again(now, schedule, tracks)
                    job.store.put_tables(then.name(schedule), known)
            error = now.errors(schedule, job.scenes)
            if turn == 0 or score(error) < least:
                best, least = now, score(error)
            if known is not None:
                now = evaluate.refitted(_refitted(evaluate.predictors, known), turn + 1)
    return best


def _tracks(now: Evaluator, followed: Followed, schedule: Schedule, bar: tqdm[Any]) -> list[list[Track]]:
    """Samples of the fitted trajectories that follow a schedule, by phase."""
    tracks: list[list[Track]] = [[] for _ in now.predictors]
    now.follow(schedule)
    for i in now.job.scenes:
        with followed.watched():
            now.run(schedule, i)
        for number, track in enumerate(followed.finish()):
            tracks[min(number, len(tracks) - 1)].append(track)
        bar.update()
    return tracks


def _again(now: Evaluator, schedule: Schedule, tracks: Sequence[Sequence[Track]]) -> dict[str, Tensor]:
    """The tables of the next round, by phase and name. Outputs without a latent keep theirs: nothing says what they lead to."""
    steps, found = len(now.job.timesteps), dict[str, Tensor]()
    for phase, (of, predictor) in enumerate(zip(tracks, now.predictors, strict=True)):
        outputs = predictor.of if isinstance(predictor, _Refitted) else predictor
        assert isinstance(outputs, Outputs)
        whole = schedule[phase * steps : (phase + 1) * steps]
        tables = predictor.tables(whole)
        full, own = [recording.near for recording in now.job.recordings[phase]], outputs.part_schedules(whole)
        lanes = 1 if outputs.apart else next(iter(of[0].outputs.values())).shape[1]
        for rule in outputs.rules:
            if rule.latent is not None:
                tables |= outputs.placed(rule, whole, refit(rule, full, of, own * lanes, apart=outputs.apart))
        found |= {f"{phase}/{name}": table for name, table in tables.items()}
    return found


def _refitted(predictors: Sequence[Predictor], found: Mapping[str, Tensor]) -> list[Predictor]:
    result: list[Predictor] = []
    for phase, predictor in enumerate(predictors):
        assert isinstance(predictor, Outputs)
        of = f"{phase}/"
        result.append(_Refitted(predictor, {n.removeprefix(of): t for n, t in found.items() if n.startswith(of)}))
    return result
