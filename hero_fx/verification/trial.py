"""The runs of one verification and what they are compared with: each check of the table in `verify`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import Tensor, nn

from hero_fx.config import Config
from hero_fx.passes.analysis.exchange import collectives
from hero_fx.passes.rewrite.plan import Refresh, ScoredRefresh
from hero_fx.runtime.calling import Session, calling, session

from .compare import Outputs, strange_products, tolerance, worst
from .compiled import Call, Compiled
from .example import Example, look, twin_of
from .variants import all_keys, all_live, altered, plain, short_schedule, with_schedule

__all__ = ["Check", "Trial"]

Variant = Literal["ours", "plain", "other form", "all live", "all keys"]
"""Ways to compile the model."""


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    name: str
    compared: str
    """What with what."""
    error: float
    """The largest of `|a - b| / max |b|` over all steps and outputs; a count where products are compared."""
    tolerance: float
    """0 for the same bits."""
    note: str = ""
    """What was raised, if the check did not come to its end."""

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return self.error <= self.tolerance


class Trial:
    """All runs of one verification."""

    def __init__(self, model: Callable[..., Any], call: Call, config: Config) -> None:
        """Compiles the call in all ways.

        Raises:
            ValueError: the model cannot be accelerated with these options, or its timestep or latents are no tensors of
                the call.
        """
        self.model = model
        self._id = uuid4().hex
        self._numbers = count()
        self._opened: list[str] = []
        self.compiled = Compiled(model, call, lambda source: self._choose(look(model, call, source, config), config))

    def _choose(self, example: Example, config: Config) -> dict[str, Config]:
        self.example, self.plans = example, example.steps.plans
        # Processes that run a model together must agree on every call, so each call is named.
        self._lane = "only" if collectives(example.steps.normal) else None
        self.mask = short_schedule(config, self.plans)
        self.config = with_schedule(config, self.mask)
        self.calls = example.trajectory(len(self.mask), seed=0)
        self.others = example.trajectory(len(self.mask), seed=1)
        return self._variants()

    def _variants(self) -> dict[str, Config]:
        """The options of all runs. Each is for one check, but for "ours"."""
        config, strategies = self.config, [strategy for plan in self.plans for _, strategy in plan]
        variants: dict[str, Config] = {
            "ours": config,
            "plain": plain(config),
            "other form": replace(config, form="literal" if config.form == "collapsed" else "collapsed"),
        }
        if any(isinstance(strategy, (Refresh, ScoredRefresh)) for strategy in strategies):
            variants["all live"] = altered(config, all_live, refresh_ratio=1.0)
        if any(isinstance(strategy, Refresh) and strategy.keys != "all" for strategy in strategies):
            variants["all keys"] = altered(config, all_keys)
        return variants

    def checks(self) -> Iterator[Check]:
        """The rows, in the order of the table."""
        bits, rounding = 0.0, tolerance(self.example.steps)
        kept, plainly_kept = list[list[Tensor]](), list[list[Tensor]]()
        full = self.run("plain", self.calls, kept=plainly_kept)
        alone = list[list[Tensor]]()

        def told() -> float:
            alone.extend(self.run("ours", self.calls, kept=kept))
            stats = self.compiled.backend("ours").stats()
            return float(abs(stats.full_steps - sum(self.mask)) + abs(stats.cached_steps - self.mask.count(False)))

        # What follows is compared with this run: if it was not the one intended, the rest would show nothing.
        yield (first := self._try("steps", "the schedule", bits, told))
        yield self._try("matrix products", "dtypes in the model", bits, self._products)
        if not first.ok:
            return
        places = [i for i, is_full in enumerate(self.mask) if is_full]
        yield self._try("full steps", "plain compilation", rounding, lambda: _worst_at(places, alone, full))
        yield self._try("collapsed form", "literal form", rounding, lambda: self._forms(alone))
        if "all live" in self.compiled:
            yield self._try("refresh of all tokens", "full compute", rounding, lambda: self._refresh(full))
        yield self._try("constant trajectory", "its own full step", rounding, self._constant)
        if not _reuses_outputs(self.config):
            yield self._try("kept outputs", "as returned", bits, lambda: _changed((kept, alone), (plainly_kept, full)))
        yield self._try("repeat", "first run", bits, lambda: worst(self.run("ours", self.calls), alone))
        yield self._try("two sessions in turns", "each alone", bits, lambda: self._sessions(alone))
        twin = self._twin()
        if twin is not None:
            yield self._try("two models, one backend", "each alone", bits, lambda: self._models(twin, alone))

    def run(
        self, variant: Variant, calls: Sequence[Call], model: Any = None, kept: list[list[Tensor]] | None = None
    ) -> list[list[Tensor]]:
        """The outputs of calls in a session of their own; `kept` gets the very tensors that were returned."""
        outputs: list[list[Tensor]] = []
        with self.session():
            for call in calls:
                outputs.append(self.step(variant, call, model, kept))
        return outputs

    def step(
        self,
        variant: Variant,
        call: Call,
        model: Any = None,
        kept: list[list[Tensor]] | None = None,
        index: int | None = None,
    ) -> list[Tensor]:
        """A copy of the outputs of one call; `index`: its step, where that is to be said."""
        self.example.restore()
        if _reuses_outputs(self.config):
            torch.compiler.cudagraph_mark_step_begin()
        with self._word(index):
            returned = self.compiled(variant, model or self.model, call)
        if kept is not None:
            kept.append(returned)
        return [tensor.clone() for tensor in returned]

    def _word(self, index: int | None) -> AbstractContextManager[object]:
        """What is said of a call: no more than has to be, since the rest is to be told from the call itself."""
        if index is None and self._lane is None:
            return nullcontext()
        return calling(lane=self._lane, step_index=index)

    def last_run(self, variant: Variant) -> list[list[Tensor]]:
        """The outputs of a variant that no other check needs: its state is freed."""
        try:
            return self.run(variant, self.calls)
        finally:
            self.compiled.backend(variant).reset()

    def session(self) -> Session:
        """A new session."""
        name = f"hero_fx.verify {self._id} {next(self._numbers)}"
        self._opened.append(name)
        return session(name)

    def finish(self) -> None:
        """Frees the state of all sessions, and gives the model's buffers their values back."""
        for name in self._opened:
            session(name).drop()
        self.example.restore()

    def _try(self, name: str, compared: str, tolerance: float, error: Callable[[], float]) -> Check:
        try:
            return Check(name, compared, error(), tolerance)
        except Exception as raised:  # whatever it is, the check does not hold, and the table says why
            reason = str(raised).strip().splitlines() or [""]
            return Check(name, compared, float("inf"), tolerance, f"{type(raised).__name__}: {reason[0]}")

    def _products(self) -> float:
        return float(len(strange_products(self.example.steps.normal, self.example.steps.cached)))

    def _forms(self, alone: Outputs) -> float:
        """The other form of the same steps."""
        other = self.last_run("other form")
        return worst(alone, other) if self.config.form == "collapsed" else worst(other, alone)

    def _refresh(self, plain: Outputs) -> float:
        """Cached steps that leave nothing out."""
        return worst(self.last_run("all live"), plain)

    def _constant(self) -> float:
        """One call again and again, at steps that are told."""
        variant: Variant = "all keys" if "all keys" in self.compiled else "ours"
        outputs = list[list[Tensor]]()
        with self.session():
            for index in range(len(self.mask)):
                outputs.append(self.step(variant, self.calls[0], index=index))
        return worst(outputs, [outputs[0]] * len(outputs))

    def _sessions(self, alone: Outputs) -> float:
        other_alone = self.run("ours", self.others)
        first, second = self.session(), self.session()
        mixed, other = list[list[Tensor]](), list[list[Tensor]]()
        for call, other_call in zip(self.calls, self.others, strict=True):
            with first:
                mixed.append(self.step("ours", call))
            with second:
                other.append(self.step("ours", other_call))
        return max(worst(mixed, alone), worst(other, other_alone))

    def _twin(self) -> nn.Module | None:
        if not isinstance(self.model, nn.Module) or self.example.weight is None:
            return None
        return twin_of(self.model, self.example.weight)

    def _models(self, twin: nn.Module, alone: Outputs) -> float:
        """Two experts: the second takes over at a step that is cached, which is said; and two that are called in turns."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="hero_fx: another model takes over")
            return self._experts(twin, alone)

    def _experts(self, twin: nn.Module, alone: Outputs) -> float:
        taken = self.mask.index(False)
        twin_alone, rest_alone = (self.run("ours", calls, twin) for calls in (self.others, self.others[taken:]))
        with self.session():
            for call in self.calls[:taken]:
                self.step("ours", call)
            rest = [self.step("ours", call, twin) for call in self.others[taken:]]
        with self.session():
            turns = [
                (self.step("ours", call), self.step("ours", other, twin))
                for call, other in zip(self.calls, self.others, strict=True)
            ]
        return max(
            worst(rest, rest_alone), worst([a for a, _ in turns], alone), worst([b for _, b in turns], twin_alone)
        )


def _worst_at(places: Sequence[int], ours: Outputs, theirs: Outputs) -> float:
    return worst([ours[i] for i in places], [theirs[i] for i in places])


def _changed(ours: tuple[Outputs, Outputs], plainly: tuple[Outputs, Outputs]) -> float:
    """How much outputs differ from their copies of when they were returned, those aside where plain compilation's do too."""
    rows = zip(*plainly, strict=True)
    same = [[torch.equal(a, b) for a, b in zip(kept, copies, strict=True)] for kept, copies in rows]
    fixed = [j for j in range(len(same[0])) if all(row[j] for row in same)]
    kept, copies = ([[row[j] for j in fixed] for row in rows] for rows in ours)
    return worst(kept, copies)


def _reuses_outputs(config: Config) -> bool:
    """True where CUDA graphs give the memory of an output to the next call, with plain compilation too."""
    return config.mode in ("reduce-overhead", "max-autotune") or bool((config.options or {}).get("triton.cudagraphs"))
