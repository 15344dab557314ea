"""Running schedules: how far each leads from full compute."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hero_fx.backends import Backend
from hero_fx.plan import Plan, Timeline
from hero_fx.runtime.calling import session

from .record import Recorder, Recording
from .search import Schedule
from .tables import Predictor

__all__ = ["Distances", "Evaluator", "Job", "Run", "Store", "log_sum", "plan_for"]

Run = Callable[[Any, int], Any]
Distances = Callable[[Any, Any], Mapping[str, float]]


@dataclass(slots=True)
class Job:
    """What the parts of a calibration share."""

    model: Any
    run: Run
    recorder: Recorder
    recordings: list[list[Recording]]
    """Of the fitted trajectories, by phase."""
    finals: dict[int, Any]
    scenes: tuple[int, ...]
    holdout: tuple[int, ...]
    distances: Distances
    options: dict[str, Any]
    store: Store
    seed: int
    evaluations: int
    must: frozenset[int]
    """Steps of a trajectory that have to be full, the first one among them."""
    searched: int
    """Trajectories that an evaluation of the search runs."""
    parts: int = 1
    """Of the batch, with full steps of their own; full steps are then counted for each."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """How much the logarithm of each distance counts; 1 where nothing is said."""
    start: Schedule | None = None
    """What every search of as many full steps starts with, of all phases in a row."""
    bar: Any = None

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of every trajectory."""
        return self.recordings[0][0].timesteps

    def run_alone(self, compiled: Any, i: int) -> Any:
        """Runs trajectory i; where it is made of several, as a session of its own, which tells the first of them."""
        if len(self.recordings) == 1:
            return self.run(compiled, i)
        with session(f"trajectory {i} of hero_fx.calibrate"):
            return self.run(compiled, i)


@dataclass(slots=True)
class Store:
    """What has been evaluated, kept in a file so that a calibration that was cut off goes on."""

    path: Path | None
    known: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            self.known = json.loads(self.path.read_text())

    def tables(self, name: str) -> dict[str, Tensor] | None:
        """Tables that were kept under a name."""
        path = self._file(name)
        return load_file(path) if path is not None and path.exists() else None

    def put_tables(self, name: str, tables: Mapping[str, Tensor]) -> None:
        """Keeps tables."""
        if (path := self._file(name)) is not None:
            part = path.with_suffix(".part")
            save_file({key: table.contiguous() for key, table in tables.items()}, part)
            part.replace(path)

    def _file(self, name: str) -> Path | None:
        return None if self.path is None else self.path.with_name(f"{name}.safetensors")

    def put(self, key: str, found: Mapping[str, float]) -> None:
        self.known[key] = dict(found)
        if self.path is not None:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.known))
            part.replace(self.path)


def plan_for(
    job: Job, base: Mapping[str, Any], predictors: Sequence[Predictor], schedule: Schedule, **more: Any
) -> Plan:
    """The plan of a schedule, that of all phases in a row, with fitted coefficients."""
    times = job.timesteps
    schedules = [schedule[n * len(times) : (n + 1) * len(times)] for n in range(len(predictors))]
    lines = [
        Timeline(
            schedule=tuple(map(bool, own)), timesteps=times, coefficients=predictor.tables(own),
            parts=predictor.part_schedules(own) if predictor.parts > 1 else (), phase=phase, **more,
        )
        for phase, (own, predictor) in enumerate(zip(schedules, predictors, strict=True))
    ]  # fmt: skip
    return Plan(timelines=tuple(lines), **base)


class Evaluator:
    """Runs schedules."""

    def __init__(
        self, job: Job, base: Mapping[str, Any], predictors: Sequence[Predictor], chosen: Backend, compiled: Any
    ) -> None:
        """`predictors`: by phase."""
        self.job, self.base, self.predictors, self.chosen, self.compiled = job, base, predictors, chosen, compiled
        self.rounds = 0
        """In which coefficients were fitted again."""
        self.tried: dict[Schedule, dict[str, float]] = {}
        """Every schedule that was run, and its error."""

    def refitted(self, predictors: Sequence[Predictor], rounds: int) -> Evaluator:
        """The same with coefficients that were fitted again, in so many rounds."""
        notes = {"fitted again": f"in the closed loop, round {rounds}"} if rounds else {}
        base = {**self.base, "notes": {**self.base["notes"], **notes}}
        found = Evaluator(self.job, base, predictors, self.chosen, self.compiled)
        found.tried, found.rounds = self.tried, rounds
        return found

    def name(self, schedule: Schedule) -> str:
        """Of the file with the coefficients that were fitted again."""
        return f"closed-loop-{self._key(schedule, self.job.recorder.samples)}"

    def error(self, schedule: Schedule) -> dict[str, float]:
        """Distances to full compute, mean over the trajectories that are searched on."""
        if schedule not in self.tried:
            self.tried[schedule] = self.errors(schedule, self.job.scenes[: self.job.searched])
            if self.job.bar is not None:
                self.job.bar.update()
        return self.tried[schedule]

    def errors(self, schedule: Schedule, numbers: Sequence[int]) -> dict[str, float]:
        """Distances to full compute, mean over trajectories."""
        followed = False
        for i in numbers:
            if not self.knows(schedule, i):
                if not followed:
                    self.follow(schedule)
                followed = True
                self.run(schedule, i)
        total = dict[str, float]()
        for i in numbers:
            for name, value in self.job.store.known[self._key(schedule, i)].items():
                total[name] = total.get(name, 0.0) + value / len(numbers)
        return total

    def knows(self, schedule: Schedule, i: int) -> bool:
        """Whether trajectory i has been run by a schedule."""
        return self._key(schedule, i) in self.job.store.known

    def follow(self, schedule: Schedule) -> None:
        """What runs from now on goes by a schedule."""
        self.chosen.follow(plan_for(self.job, self.base, self.predictors, schedule))

    def run(self, schedule: Schedule, i: int) -> None:
        """Runs trajectory i by the schedule that is followed, and keeps how far it leads from full compute."""
        self.chosen.reset()
        sample = self.job.run_alone(self.compiled, i)
        self.job.store.put(self._key(schedule, i), self.job.distances(sample, self.job.finals[i]))

    def _key(self, schedule: Schedule, i: int) -> str:
        """All that the result depends on, so far as it is known here: not the weights, for which a folder is."""
        of = [
            self.base["policy"], str(self.base.get("outputs")), str(self.base.get("options")), self.job.scenes, i,
            "".join(str(int(level)) for level in schedule), *["apart"] * (self.predictors[0].parts > 1),
            str(self.job.timesteps), *[f"closed loop {self.rounds}"] * (self.rounds > 0),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:32]


def log_sum(error: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """What candidates are compared by: the weighted sum of the logarithms of all distances."""
    return sum(weights.get(name, 1.0) * math.log(max(value, 1e-12)) for name, value in error.items())
