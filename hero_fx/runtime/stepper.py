"""What runs at each call of the compiled model: the tracker chooses a step graph, and its extra inputs are filled in."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hero_fx.passes.slots import IndexSlot, RowsSlot, ScalarSlot, Slot, StateSlot, TableSlot, of_part
from hero_fx.policy import Policy
from hero_fx.program import Program
from hero_fx.schedule import Schedule
from hero_fx.selection import PatchSampler
from hero_fx.stack import warn
from hero_fx.step_graphs import StateSpec, StepGraphs
from hero_fx.warm.called import Called
from hero_fx.warm.probe import current_probe

from .batch import CODE, current_batch, only_call
from .budget import Budget, OverBudget
from .calling import current_session
from .diffusers_context import Heard, heard
from .evidence import Evidence, current_owner, marks
from .filling import Constants, Selections, scalar_value
from .inputs import Inputs
from .planned import Planned
from .state import StateStore, Trajectory
from .steps import BatchedStep, CompiledStep, Placed
from .timestep import AmbiguousCall, Timestep, TimestepReader
from .tracker import Call, Tracker
from .watch import Watch
from .weights import Model, Weights

__all__ = ["CompiledStep", "Stepper"]

log = logging.getLogger(__name__)


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
        program: Program | None = None,
    ) -> None:
        """`context`: the cache context of the first call, if it was entered before anyone listened; `counts`: where calls and
        steps are counted; `watch`: over all graphs of the backend; `again`: why the model was compiled once more; `called`:
        the call that it was compiled for; `program`: what the graph computes."""
        self.full = full
        self.cached = tuple(cached)
        self.policy = policy
        self.inputs = inputs
        self.graphs = graphs
        self.strict = strict
        self.again = again
        self.called = called
        self.program = program
        self.batched: dict[tuple[int | None, tuple[bool, ...], int], BatchedStep] = {}
        """Step graphs for several requests: by kind (None is full), which inputs have rows of their own, and how many."""
        self.store = StateStore(state, partial(_tracker, schedule, planned, inputs), budget)
        self.weights = Weights(inputs.weights, self.store.drop_model)
        self.selections = Selections(sampler, full.device) if sampler is not None else None
        self.reader = TimestepReader()
        self.planned = planned
        self.parts = 1 if planned is None else planned.plan.parts
        """Of the batch, for which the step graphs run one after another."""
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.last: Call | None = None
        self._context = context
        self._watch = watch
        self._constants = Constants()
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
        batch = current_batch()
        if batch is not None and len(batch.calls) > 1:
            raise RuntimeError(CODE)
        model = self.weights.model(inputs)
        try:
            said = only_call()
            session = current_session() if said is None or said.session is None else said.session
            evidence = self._evidence(inputs, model)
            trajectory, call = self.place(session, model, evidence)
            if self._watch is not None and not session:
                self._watch.goes_on(trajectory.tracker, evidence)
        except (AmbiguousCall, ValueError) as error:
            if self.strict:
                raise
            return self.alone(inputs, error)
        try:
            return self.step(self.prepare(trajectory, call, session, model, evidence), inputs)
        except OverBudget as error:
            trajectory.tracker.reset()
            if self.strict:
                raise
            return self.alone(inputs, error)
        except BaseException:
            # The state may be half written, and a call that is made again must not pass for the step's next lane.
            trajectory.tracker.reset()
            raise
        finally:
            self.release(trajectory)

    def place(self, session: str, model: Model, evidence: Evidence) -> tuple[Trajectory, Call]:
        """The call in its trajectory, whose lock is then held. Calls of a named session wait for each other."""
        trajectory = self.store.trajectory(session, model)
        if not trajectory.lock.acquire(blocking=bool(session)):
            raise AmbiguousCall(
                "two calls without a session overlap: they would share one trajectory. Enter hero_fx.session(...) in the "
                "function that calls the model, or use hero_fx.calling(session=...) around each call"
            )
        trajectory.running += 1
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
            self.release(trajectory)
            raise

    def release(self, trajectory: Trajectory) -> None:
        """Ends a call that was placed."""
        trajectory.running -= 1
        trajectory.lock.release()

    def _evidence(self, inputs: Sequence[Any], model: Model) -> Evidence:
        """What a call is made of."""
        said, word = heard(model.is_of), only_call()
        if said is None:
            said, self._context = self._context, None
        name, step_index = (None, None) if said is None else (said.name, said.step_index)
        told, num_steps = False, None
        if word is not None:
            word.use(id(model))
            told, num_steps = word.lane is not None, word.num_steps
            name = name if word.lane is None else word.lane
            step_index = step_index if word.step_index is None else word.step_index
        if self.inputs.shared and name is None:
            raise AmbiguousCall(
                "several processes run this model together and must all take a call for the same lane, which each would "
                "tell by its own memory: name it with hero_fx.calling(lane=..., step_index=...) around each call, or with "
                "diffusers' cache_context(name)"
            )
        return Evidence(
            timestep=self.read(inputs[self.inputs.timestep]),
            marks=marks([inputs[p] for p in self.inputs.values]),
            name=name,
            step_index=step_index,
            told=told,
            num_steps=num_steps,
            batched=current_batch() is not None,
        )

    def read(self, timestep: torch.Tensor) -> Timestep:
        """The timestep of a call. Where several processes must agree, its place in a table in memory tells nothing."""
        with self._lock:
            found = self.reader.read(timestep, self.inputs.batch)
        return replace(found, table=None) if self.inputs.shared else found

    def prepare(self, trajectory: Trajectory, call: Call, session: str, model: Model, evidence: Evidence) -> Placed:
        """All that the step graph of a placed call needs.

        Raises:
            OverBudget: there is no room for its state.
            RuntimeError: it is none that the plan was made for.
        """
        if call.new_trajectory:
            if self._watch is not None:
                self._watch.starts(self, session, model, evidence)
            trajectory.patterns.clear()
        before, computed = trajectory.patterns.get(call.lane, ()), tuple[bool, ...]()
        if self.planned is not None and self.parts > 1:
            computed = self.planned.computed(call, before)
        pattern = trajectory.patterns[call.lane] = (*before, sum(computed) if computed else call.full)
        lane = list(trajectory.patterns).index(call.lane)
        if self.planned is not None:
            self.planned.check(call, pattern, lane, evidence.timestep)
        state = self.store.lane(trajectory, call.lane, fresh=call.full and call.fulls == 0)
        placed = Placed(call, lane, state, pattern, computed)
        self._count(placed, trajectory)
        return placed

    def kind(self, call: Call) -> int | None:
        """Which of the cached step graphs a call runs; None for the full one."""
        return None if call.full else self.policy.kind(call.since_full)

    def step(self, placed: Placed, inputs: Sequence[Any]) -> Any:
        """Runs the step graph of one call."""
        placed.state.own()
        if self.parts == 1:
            return self._run(placed, self.kind(placed.call), inputs)
        outputs = []
        for part, full in enumerate(placed.computed):
            kind = None if full else self.policy.kind(placed.call.since_full)
            outputs.append(self._run(replace(placed, part=part), kind, inputs))
        return tuple(map(torch.cat, zip(*outputs, strict=True)))

    def _run(self, placed: Placed, kind: int | None, inputs: Sequence[Any]) -> Any:
        step = self.full if kind is None else self.cached[kind]
        return step.run(*inputs, *(self.fill(slot, placed, step.device) for slot in step.slots))

    def _count(self, placed: Placed, trajectory: Trajectory) -> None:
        """Counts the call, and its step: as cached where some call of it is."""
        call = placed.call
        with self._lock:
            self.counts["partial_calls"] += call.full and not all(placed.computed)
            self.last = call
            self.counts["full_calls" if call.full else "cached_calls"] += 1
            if call.new_step:
                trajectory.caches = not call.full
                self.counts["full_steps" if call.full else "cached_steps"] += 1
            elif not call.full and not trajectory.caches:
                trajectory.caches = True
                self.counts["full_steps"] -= 1
                self.counts["cached_steps"] += 1

    def alone(self, inputs: Sequence[Any], error: Exception) -> Any:
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
        call, state = Call(0, 0, True, 0, 0, 0, True, 0), self.store.new_lane()
        return self.step(Placed(call, 0, state, (True,), (True,) * self.parts), inputs)

    def fill(self, slot: Slot, placed: Placed, device: torch.device) -> torch.Tensor:
        """What an extra input of a step graph is at a call."""
        match slot:
            case StateSlot():
                return placed.state.tensors[of_part(slot, placed.part)]
            case ScalarSlot():
                return self._constants.scalar(scalar_value(slot, placed.call), device)
            case IndexSlot(layer):
                assert self.selections is not None
                return self.selections.at(placed.pattern)[layer or 0]
            case RowsSlot():
                return self._constants.rows(slot, placed.part, device)
            case TableSlot():
                assert self.planned is not None
                return self.planned.weight(slot, placed.call, placed.lane if self.parts == 1 else placed.part, device)
