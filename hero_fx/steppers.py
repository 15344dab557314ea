"""All that one backend runs: a stepper for each compiled graph, with counts, budget and notes that they share."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hero_fx.runtime.budget import Budget
from hero_fx.runtime.planned import planned_for
from hero_fx.runtime.stepper import CompiledStep, Stepper
from hero_fx.runtime.watch import Watch

from .config import Config
from .policy import Policy
from .stats import Stats

__all__ = ["Steppers"]


class Steppers:
    """The steppers of a backend. They are held weakly: what Dynamo drops is gone, and its state with it."""

    def __init__(self, max_state_bytes: int | None) -> None:
        self._all: list[weakref.ref[Stepper]] = []
        self._counts: Counter[str] = Counter()
        self._watch = Watch()
        self._budget = Budget(max_state_bytes)

    def make(
        self, config: Config, policy: Policy, full: CompiledStep, cached: Sequence[CompiledStep], **parts: Any
    ) -> Stepper:
        """A stepper by a backend's options; `parts` are further arguments of `Stepper`."""
        stepper = Stepper(
            full=full,
            cached=cached,
            policy=policy,
            schedule=config.schedule_of,
            strict=config.strict,
            counts=self._counts,
            watch=self._watch,
            planned=planned_for(config),
            budget=self._budget,
            **parts,
        )
        self._all.append(weakref.ref(stepper))
        self._watch.add(stepper)
        return stepper

    @property
    def alive(self) -> list[Stepper]:
        """Those in use, oldest first."""
        alive = [(ref, ref()) for ref in self._all]
        self._all = [ref for ref, stepper in alive if stepper is not None]
        return [stepper for _, stepper in alive if stepper is not None]

    def stats(self) -> Stats:
        """Counts over all there ever were; graphs and state are what there is now."""
        steppers, counts = self.alive, self._counts
        by_session: dict[str, int] = {}
        for stepper in steppers:
            for name, held in stepper.store.sessions.items():
                by_session[name] = by_session.get(name, 0) + held
        return Stats(
            graphs=len(steppers),
            full_steps=counts["full_steps"],
            cached_steps=counts["cached_steps"],
            full_calls=counts["full_calls"],
            cached_calls=counts["cached_calls"],
            refused_calls=counts["refused_calls"],
            state_bytes=sum(s.store.nbytes for s in steppers),
            batched_graphs=sum(len(stepper.batched) for stepper in steppers),
            partial_calls=counts["partial_calls"],
            evictions=self._budget.evictions,
            sessions=len(by_session),
            bytes_by_session=by_session,
        )
