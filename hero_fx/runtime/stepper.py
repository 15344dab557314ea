"""What runs at each call of the compiled model: the tracker chooses a step graph, and its extra inputs are filled in."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hero_fx.dynamo import Compiled
from hero_fx.passes.slots import IndexSlot, ScalarSlot, Slot, StateSlot, TableSlot
from hero_fx.policy import Policy
from hero_fx.schedule import Schedule
from hero_fx.selection import PatchSampler
from hero_fx.stack import warn
from hero_fx.step_graphs import StateSpec, StepGraphs
from hero_fx.warm.called import Called
from hero_fx.warm.probe import current_probe

from .budget import Budget, OverBudget
from .calling import current_calling, current_session
from .diffusers_context import Heard, heard
from .evidence import Evidence, current_owner, marks
from .filling import Selections, scalar_value
from .inputs import Inputs
from .planned import Planned
from .state import StateStore, Trajectory
from .timestep import AmbiguousCall, Timestep, TimestepReader
from .tracker import Call, Tracker
from .watch import Watch
from .weights import Model, Weights

__all__ = ["CompiledStep", "Stepper"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """A compiled step graph and what its extra inputs are."""

    run: Compiled
    slots: tuple[Slot, ...]
    device: torch.device


def _tracker(
    schedule: Callable[[int | None], Schedule], planned: Planned | None, inputs: Inputs, before: int
) -> Tracker:
    """A tracker, after `before` trajectories."""
    chosen = planned.schedule if planned is not None else lambda seen: schedule(seen.num_steps)
    strict = planned is not None
    return Tracker(chosen, roles=inputs.roles, strict=strict, trajectory=before, shared=inputs.shared)


class Stepper:
    """The callable that Dynamo gets for one graph."""

    def __init__(
        self,
        *,
        full: CompiledStep,
        cached: Sequence[CompiledStep],
        policy: Policy,
        schedule: Callable[[int | None], Schedule],
        state: Sequence[StateSpec],
        sampler: PatchSampler | None,
        inputs: Inputs,
        graphs: StepGraphs | None = None,
        context: Heard | None = None,
        strict: bool = True,
        counts: Counter[str] | None = None,
        watch: Watch | None = None,
        again: str | None = None,
        planned: Planned | None = None,
        budget: Budget | None = None,
        called: Called | None = None,
    ) -> None:
        """`context`: the cache context of the first call, if it was entered before anyone listened; `counts`: where calls and
        steps are counted; `watch`: over all graphs of the backend; `again`: why the model was compiled once more; `called`:
        the call that it was compiled for."""
        self.full = full
        self.cached = tuple(cached)
        self.policy = policy
        self.inputs = inputs
        self.graphs = graphs
        self.strict = strict
        self.again = again
        self.called = called
        self.store = StateStore(state, partial(_tracker, schedule, planned, inputs), budget)
        self.weights = Weights(inputs.weights, self.store.drop_model)
        self.selections = Selections(sampler, full.device) if sampler is not None else None
        self.reader = TimestepReader()
        self.planned = planned
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.last: Call | None = None
        self._context = context
        self._watch = watch
        self._scalars: dict[tuple[float, torch.device], torch.Tensor] = {}
        self.store.forgets = not self._phased
        self._lock = threading.Lock()  # for what sessions share: the reader and the counts

    def follow(self, schedule: Callable[[int | None], Schedule], planned: Planned | None) -> None:
        """Goes on by another schedule and plan for the same step graphs; all trajectories are forgotten."""
        self.planned = planned
        self.store.new_tracker = partial(_tracker, schedule, planned, self.inputs)
        self.store.forgets = not self._phased
        self.store.drop()

    @property
    def _phased(self) -> bool:
        """Whether it matters how many trajectories a session had before."""
        return self.planned is not None and self.planned.phases > 1

    def __call__(self, *inputs: Any) -> Any:
        probe = current_probe()
        if probe is not None:
            return probe(self, inputs)
        model = self.weights.model(inputs)
        try:
            session = current_session()
            evidence = self._evidence(inputs, model)
            trajectory, call = self._place(session, model, evidence)
        except (AmbiguousCall, ValueError) as error:
            if self.strict:
                raise
            return self._alone(inputs, error)
        try:
            if call.new_trajectory and self._watch is not None:
                self._watch.starts(self, session, model, evidence)
            return self._run(call, trajectory, inputs, evidence.timestep)
        except OverBudget as error:
            trajectory.tracker.reset()
            if self.strict:
                raise
            return self._alone(inputs, error)
        except BaseException:
            # The state may be half written, and a call that is made again must not pass for the step's next lane.
            trajectory.tracker.reset()
            raise
        finally:
            trajectory.lock.release()

    def _place(self, session: str, model: Model, evidence: Evidence) -> tuple[Trajectory, Call]:
        """The call in its trajectory, whose lock is then held. Calls of a named session wait for each other."""
        trajectory = self.store.trajectory(session, model)
        if not trajectory.lock.acquire(blocking=bool(session)):
            raise AmbiguousCall(
                "two calls without a session overlap: they would share one trajectory. Enter hero_fx.session(...) in the "
                "function that calls the model, or use hero_fx.calling(session=...) around each call"
            )
        try:
            if not session:
                if self.planned is not None:
                    self.planned.check_session()
                trajectory.claim(current_owner(), evidence, self.store.new_tracker)
            self.store.budget.use(trajectory)
            if self._watch is None or not self._phased:
                return trajectory, trajectory.tracker.advance(evidence)
            return trajectory, trajectory.tracker.advance(evidence, partial(self._watch.finished, self, session, model))
        except BaseException:
            trajectory.lock.release()
            raise

    def _evidence(self, inputs: Sequence[Any], model: Model) -> Evidence:
        """What a call is made of."""
        said, word = heard(model.is_of), current_calling()
        if said is None:
            said, self._context = self._context, None
        name, step_index = (None, None) if said is None else (said.name, said.step_index)
        told, num_steps = False, None
        if word is not None:
            word.use(id(model))
            told, num_steps = word.lane is not None, word.num_steps
            name = name if word.lane is None else word.lane
            step_index = step_index if word.step_index is None else word.step_index
        with self._lock:
            timestep = self.reader.read(inputs[self.inputs.timestep], self.inputs.batch)
        if self.inputs.shared:
            timestep = replace(timestep, table=None)
            if name is None:
                raise AmbiguousCall(
                    "several processes run this model together and must all take a call for the same lane, which each would "
                    "tell by its own memory: name it with hero_fx.calling(lane=..., step_index=...) around each call, or with "
                    "diffusers' cache_context(name)"
                )
        return Evidence(
            timestep=timestep,
            marks=marks([inputs[p] for p in self.inputs.values]),
            name=name,
            step_index=step_index,
            told=told,
            num_steps=num_steps,
        )

    def _run(self, call: Call, trajectory: Trajectory, inputs: Sequence[Any], timestep: Timestep) -> Any:
        if call.new_trajectory:
            trajectory.patterns.clear()
        pattern = (*trajectory.patterns.get(call.lane, ()), call.full)
        trajectory.patterns[call.lane] = pattern
        lane = list(trajectory.patterns).index(call.lane)
        if self.planned is not None:
            self.planned.check(call, pattern, lane, timestep)
        state = self.store.lane(trajectory, call.lane, fresh=call.full and call.fulls == 0)
        self._count(call, trajectory)
        return self._step(call, lane, state, pattern, inputs)

    def _step(
        self,
        call: Call,
        lane: int,
        state: dict[StateSlot, torch.Tensor],
        pattern: tuple[bool, ...],
        inputs: Sequence[Any],
    ) -> Any:
        step = self.full if call.full else self.cached[self.policy.kind(call.since_full)]
        return step.run(*inputs, *(self._fill(slot, call, lane, state, pattern, step.device) for slot in step.slots))

    def _count(self, call: Call, trajectory: Trajectory) -> None:
        """Counts the call, and its step: as cached where some call of it is."""
        with self._lock:
            self.last = call
            self.counts["full_calls" if call.full else "cached_calls"] += 1
            if call.new_step:
                trajectory.caches = not call.full
                self.counts["full_steps" if call.full else "cached_steps"] += 1
            elif not call.full and not trajectory.caches:
                trajectory.caches = True
                self.counts["full_steps"] -= 1
                self.counts["cached_steps"] += 1

    def _alone(self, inputs: Sequence[Any], error: Exception) -> Any:
        """Computes a call in full, by itself: right whatever trajectory it is of."""
        message = f"hero_fx computes a call in full and caches nothing of it: {error}"
        with self._lock:
            self.counts["full_calls"] += 1
            self.counts["refused_calls"] += 1
            first = self.counts["refused_calls"] == 1
        if first:
            warn(message)
        else:
            log.info("%s", message)
        call = Call(0, 0, True, 0, 0, 0, True, 0)
        return self._step(call, 0, self.store.new_lane(), (True,), inputs)

    def _fill(
        self,
        slot: Slot,
        call: Call,
        lane: int,
        state: dict[StateSlot, torch.Tensor],
        pattern: tuple[bool, ...],
        device: torch.device,
    ) -> torch.Tensor:
        match slot:
            case StateSlot():
                return state[slot]
            case ScalarSlot():
                return self._scalar(scalar_value(slot, call), device)
            case IndexSlot(layer):
                assert self.selections is not None
                return self.selections.at(pattern)[layer or 0]
            case TableSlot():
                assert self.planned is not None
                return self.planned.weight(slot, call, lane, device)

    def _scalar(self, value: float, device: torch.device) -> torch.Tensor:
        """A 0-d tensor on the device, made once per value: x and 1 / d take few values, so none is copied per call."""
        key = (value, device)
        if key not in self._scalars:
            with torch.inference_mode(False):
                self._scalars[key] = torch.tensor(value, dtype=torch.float32, device=device)
        return self._scalars[key]
