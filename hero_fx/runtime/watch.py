"""Trajectories that fall apart: several graphs or models that see parts of one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from hero_fx.stack import warn

from .evidence import Evidence
from .tracker import Tracker
from .weights import Model

if TYPE_CHECKING:
    from .stepper import Stepper

__all__ = ["Watch"]


class Watch:
    """Says, once for each cause, that a graph sees the middle of a trajectory that another one began.

    Each compiled graph has features of its own, and each model a trajectory of its own. So where one takes over from
    another, it starts with full steps, and `num_steps` counts its own steps: right, but not what was asked for. Where every
    step compiles a graph of its own, nothing is ever cached.
    """

    def __init__(self) -> None:
        self._steppers: weakref.WeakSet[Stepper] = weakref.WeakSet()
        self._said: set[str] = set()

    def add(self, stepper: Stepper) -> None:
        """Watches one more compiled graph."""
        self._steppers.add(stepper)

    def starts(self, stepper: Stepper, session: str, model: Model, evidence: Evidence) -> None:
        """Is told of a trajectory that starts."""
        for other in list(self._steppers):
            for its_model, trajectory in other.store.of_session(session):
                if (other, its_model) == (stepper, model) or not trajectory.tracker.follows(evidence):
                    continue
                same_shapes = other.inputs.shapes == stepper.inputs.shapes
                # After a single step the direction of travel is not known: only a recompile is evidence enough.
                if trajectory.tracker.step == 0 and not (same_shapes and other is not stepper):
                    continue
                self._say(*_message(stepper, other, other is not stepper and model.shares(its_model), same_shapes))
                return

    def goes_on(self, tracker: Tracker, evidence: Evidence) -> None:
        """Is told of a call without a session that was placed in a trajectory."""
        if evidence.step_index is not None or evidence.timestep.table is not None or not tracker.lanes.made_anew():
            return
        self._say(
            "restart",
            "hero_fx: the model's conditioning lies in other memory at each call. If a trajectory is cut short, and the next "
            "one starts further along, nothing tells the two apart: the next one would take features of the first. Enter "
            "hero_fx.session(...) for each trajectory, or call hero_fx.reset() where one is cut short",
        )

    def finished(self, stepper: Stepper, session: str, model: Model) -> int:
        """How many trajectories of a session other graphs of a model have finished."""
        return sum(
            trajectory.tracker.finished
            for other in list(self._steppers)
            if other is not stepper
            for its_model, trajectory in other.store.of_session(session)
            if model.shares(its_model)
        )

    def _say(self, cause: str, message: str) -> None:
        if cause not in self._said:
            self._said.add(cause)
            warn(message)


def _message(stepper: Stepper, other: Stepper, same_model: bool, same_shapes: bool) -> tuple[str, str]:
    """(cause, what to say) where `stepper` takes over from `other`."""
    then = "its trajectory starts anew with full steps, and num_steps counts its own steps"
    if not same_model:
        return "model", (
            "hero_fx: another model takes over in the middle of a trajectory, as the second expert of Wan 2.2 does: "
            f"{then}. Give each model a backend of its own with the num_steps that it runs"
        )
    guard = f" The guard that failed: {stepper.again}." if stepper.again else ""
    if same_shapes:
        return "recompiled", (
            f"hero_fx: the model was compiled again in the middle of a trajectory, though no input changed its shape.{guard} "
            f"Every compiled graph has features of its own: {then}, and where every step compiles anew, nothing is cached. "
            "Keep what the guard looks at the same from call to call (often a counter in the model's forward: "
            "`self.calls += 1`)"
        )
    before = dict(other.inputs.shapes)
    changed = [
        f"{name} {list(before[name])} -> {list(shape)}"
        for name, shape in stepper.inputs.shapes
        if name in before and before[name] != shape
    ]
    return "shapes", (
        f"hero_fx: inputs changed their shape in the middle of a trajectory ({', '.join(changed) or 'other inputs'}).{guard} "
        f"Every shape has a graph and features of its own: {then}. Keep the batch the same at every step, or call the model "
        "once for each branch of guidance"
    )
