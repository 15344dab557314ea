"""What runs at a call of several requests: rows are placed one by one, and computed together where their steps are alike."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hero_fx.program import OtherProgram, Program, own_rows

from .batch import CODE, Batch, current_batch
from .budget import OverBudget
from .calling import Calling, current_calling
from .evidence import Evidence, marks
from .rows import Rows, rows_of
from .state import Trajectory
from .stepper import Stepper
from .steps import BatchedStep, Placed
from .timestep import AmbiguousCall
from .together import in_order, together
from .tracker import Call
from .weights import Model

__all__ = ["BatchStepper", "NotBatched"]

_Own = tuple[bool, ...]
_Shapes = tuple[Any, ...]
Compile = Callable[[Stepper, int | None, tuple[bool, ...], int], BatchedStep]
"""Compiles a step graph for several requests: of a stepper, of a kind (None is full), which inputs have rows of their own for
each request, and how many requests."""


class NotBatched(ValueError):
    """A batch that is not known to be what the model makes of each request alone."""


class BatchStepper:
    """The callable that Dynamo gets for the graph of a batch, which itself never runs.

    The step graphs of one request, mapped over requests, run in its place. So it is only compared with the graph of one
    request: as long as both are one program, each row is what that request is alone.
    """

    def __init__(self, program: Program, steppers: Callable[[], Sequence[Stepper]], compile: Compile) -> None:
        """`steppers`: those of single requests that there are now."""
        self._program = program
        self._steppers = steppers
        self._compile = compile
        self._known: WeakKeyDictionary[Stepper, dict[_Shapes, _Own | str]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def find(self, shapes: Sequence[Sequence[int]], calls: Sequence[Calling]) -> tuple[Stepper, _Own]:
        """What steps for one request, and which tensors of a batch of these shapes have rows of their own.

        Raises:
            NotBatched: the model was not called for one such request alone, or is another program for a batch.
        """
        reason, found = "", []
        for stepper in self._steppers():
            if stepper.program is not None:
                own = self._own_rows(stepper, stepper.program, (len(calls), *map(tuple, shapes)))
                if isinstance(own, str):
                    reason = own
                else:
                    found.append((stepper, own))
        if len(found) == 1:
            return found[0]
        if found:  # their strides differ: the one that knows the requests, or else the latest
            return max(reversed(found), key=lambda pair: sum(call.session in pair[0].store.sessions for call in calls))
        why = f"The last one of those that were is not like it: {reason}. " if reason else ""
        raise NotBatched(
            f"hero_fx.batch of {len(calls)} requests: call the model for one such request alone before, so that it is "
            f"known which rows of the batch are whose. {why}Call it once with the inputs of one request, as in the batch "
            "(within hero_fx.batch of one, or hero_fx.calling), before it is called with several"
        )

    def _own_rows(self, stepper: Stepper, program: Program, shapes: _Shapes) -> _Own | str:
        """Compared once; what differs, where it is another program. `shapes`: the number of requests, then the tensors'."""
        with self._lock:
            known = self._known.setdefault(stepper, {})
            if shapes not in known:
                try:
                    known[shapes] = own_rows(program, self._program, shapes[1:], shapes[0])
                except OtherProgram as differs:
                    known[shapes] = str(differs)
            return known[shapes]

    def __call__(self, *inputs: Any) -> Any:
        batch = current_batch()
        if batch is None or len(batch.calls) == 1:
            raise RuntimeError(CODE)
        if current_calling() is not None:
            raise RuntimeError("hero_fx.calling is entered within hero_fx.batch, which says of each request what it is")
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        stepper, own = self.find([tensor.shape for tensor in tensors], batch.calls)
        assert stepper.program is not None
        rows = rows_of(stepper.program, tensors, own, len(batch.calls))
        if stepper.parts > 1:
            raise NotBatched(
                "hero_fx.batch: the plan has full steps of their own for parts of a request's batch (apart=True), which run "
                "one after another: call the model once for each request, or calibrate without apart=True"
            )
        model = stepper.weights.model(rows.values)
        batch.use(id(model))
        try:
            outputs = self._run(stepper, model, batch, rows)
        except _Refused as refused:
            if stepper.strict:
                raise refused.error from None
            outputs = [stepper.alone(rows.alone(i), refused.error) for i in range(len(batch.calls))]
        return tuple(map(torch.cat, zip(*outputs, strict=True)))

    def _run(self, stepper: Stepper, model: Model, batch: Batch, rows: Rows) -> list[Sequence[Tensor]]:
        """The outputs of each request."""
        calls = batch.calls
        found: dict[int, tuple[Trajectory, Call]] = {}
        # In the order of their names, so that two batches never wait for each other.
        order = sorted(range(len(calls)), key=lambda i: str(calls[i].session))
        with ExitStack() as stack:
            try:
                evidence = _evidence(stepper, calls, rows)
                for i in order:
                    found[i] = stepper.place(str(calls[i].session), model, evidence[i])
                    stack.callback(stepper.release, found[i][0])
                # Once all are running, so that none is evicted to make room for another.
                placed = {i: stepper.prepare(*found[i], str(calls[i].session), model, evidence[i]) for i in order}
            except (AmbiguousCall, ValueError, OverBudget) as error:
                _forget(found.values())
                raise _Refused(error) from error
            except BaseException:
                _forget(found.values())
                raise
            try:
                return self._compute(stepper, batch, [placed[i] for i in range(len(calls))], rows)
            except BaseException:
                _forget(found.values())  # state may be half written
                raise

    def _compute(self, stepper: Stepper, batch: Batch, placed: Sequence[Placed], rows: Rows) -> list[Sequence[Tensor]]:
        kinds: dict[int | None, list[int]] = {}
        for i, own in enumerate(placed):
            kinds.setdefault(stepper.kind(own.call), []).append(i)
        outputs: dict[int, Sequence[Tensor]] = {}
        most = batch.buckets[-1]
        for kind, members in kinds.items():
            for part in (members[start : start + most] for start in range(0, len(members), most)):
                if len(part) == 1:
                    outputs[part[0]] = stepper.step(placed[part[0]], rows.alone(part[0]))
                    continue
                bucket, part = batch.bucket(len(part)), in_order(placed, part)
                step = self._step(stepper, kind, rows.own, bucket)
                outputs |= zip(part, together(stepper, step, placed, part, bucket, rows), strict=True)
        for own in placed:
            own.state.settle()  # those whose stack others of the batch have left
        return [outputs[i] for i in range(len(placed))]

    def _step(self, stepper: Stepper, kind: int | None, own: tuple[bool, ...], count: int) -> BatchedStep:
        key = kind, own, count
        with self._lock:
            if key not in stepper.batched:
                stepper.batched[key] = self._compile(stepper, *key)
            return stepper.batched[key]


class _Refused(Exception):
    """A batch with a call that has no place."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _forget(found: Iterable[tuple[Trajectory, Call]]) -> None:
    """The trajectories of calls that failed start anew."""
    for trajectory, _ in found:
        trajectory.tracker.reset()


def _evidence(stepper: Stepper, calls: Sequence[Calling], rows: Rows) -> list[Evidence]:
    """What is known of the call of each request."""
    at = stepper.inputs.timestep
    if not rows.own[at] and len({call.step_index for call in calls}) > 1:
        steps = ", ".join(str(call.step_index) for call in calls[:8])
        raise AmbiguousCall(
            f"the requests of the batch are at the steps {steps}, and share one timestep: pass a timestep with a row for each "
            "request"
        )
    times = rows.values[at].detach().cpu() if rows.own[at] else None  # one read for all
    found = []
    for i, call in enumerate(calls):
        inputs = rows.of(i)
        found.append(
            Evidence(
                timestep=stepper.read(inputs[at] if times is None else times[i]),
                marks=marks([inputs[p] for p in stepper.inputs.values]),
                name=call.lane,
                step_index=call.step_index,
                told=call.lane is not None,
                num_steps=call.num_steps,
                batched=True,
            )
        )
    return found
