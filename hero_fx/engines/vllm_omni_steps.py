"""vLLM-Omni's step mode: which requests a call of the transformer is of, and at which step each of them is.

The runner advances all its requests by one step each, and a pipeline's `denoise_step` gets them together. Where it makes them
the rows of one call, they stay together, within `hero_fx.batch`. Everywhere else it gets them one after another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch

import hero_fx
from hero_fx.runtime.batch import Batch
from hero_fx.runtime.batched import NotBatched
from hero_fx.runtime.calling import Calling

from .settings import VARIABLE, EngineError

__all__ = ["Steps", "current_step", "whole_requests"]

log = logging.getLogger(__name__)


class Step:
    """One denoising step of one request, or of several that are the rows of its calls; of none where no call is expected."""

    def __init__(self, states: Sequence[Any], *, named: bool) -> None:
        """`named`: branches are told by the order of calls."""
        self._states = states
        self._named = named
        self.calls = 0
        """Calls of the transformer that were begun."""

    def next_call(self) -> Batch | Calling:
        """What is said of the next call of the transformer."""
        if not self._states:
            raise EngineError(
                "the pipeline calls its transformer outside of denoise_step, where nothing says whose call it is: leave "
                f"step_execution (and streaming_output, which needs it) out, or unset {VARIABLE}"
            )
        lane = f"branch {self.calls}" if self._named else None
        self.calls += 1
        calls = [
            hero_fx.calling(
                session=state.request_id, lane=lane, step_index=state.step_index, num_steps=state.total_steps or None
            )
            for state in self._states
        ]
        return calls[0] if len(calls) == 1 else hero_fx.batch(calls)


_STEP: ContextVar[Step | None] = ContextVar("hero_fx_vllm_omni_step", default=None)


def current_step() -> Step | None:
    """The step that a call is of; None where whole requests are executed."""
    return _STEP.get()


@contextmanager
def _entered(step: Step | None) -> Iterator[None]:
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def whole_requests() -> AbstractContextManager[None]:
    """Within it calls are of requests that are executed as a whole, as those are that a pipeline leaves out of step mode."""
    return _entered(None)


class Steps:
    """What a runner denoises step by step."""

    def __init__(self) -> None:
        self._sessions: set[str] = set()
        self._sizes: set[tuple[Any, ...]] = set()  # of requests that were computed alone
        self._apart: set[tuple[Any, ...]] = set()  # of those whose batch is another program

    @contextmanager
    def executed(self, live: Collection[str]) -> Iterator[None]:
        """One execution; `live`: the requests that the runner has, then and afterwards. The features of others are freed."""
        try:
            with _entered(Step((), named=False)):
                yield
        finally:
            for gone in self._sessions.difference(live):
                hero_fx.session(gone).drop()
            self._sessions.intersection_update(live)

    def denoise_step(self, original: Callable[..., Any], *, as_rows: bool, together: bool) -> Callable[..., Any]:
        """A pipeline's `denoise_step`, by which its transformer's calls are told apart.

        Args:
            as_rows: the pipeline makes requests the rows of one call for each branch of guidance, always in the same order.
            together: they may stay so. It takes code for any number of rows.
        """

        def run(batch: Any, states: Sequence[Any], step: Step, **kwargs: Any) -> Any:
            self._sessions.update(state.request_id for state in states)
            with _entered(step):
                found = original(batch, states=states, **kwargs)
            if len(states) == 1 and as_rows and found is not None:
                self._sizes.add(_sizes(batch, 1))
            return found

        @wraps(original)
        def denoise_step(input_batch: Any, *, states: Sequence[Any] | None = None, **kwargs: Any) -> Any:
            states = list(input_batch.states if states is None else states)
            if len(states) == 1:
                return run(input_batch, states, Step(states, named=as_rows), **kwargs)
            # What a batch is compared with is one such request alone.
            sizes = _sizes(input_batch, len(states))
            if as_rows and together and _alike(input_batch, states) and sizes in self._sizes - self._apart:
                step = Step(states, named=as_rows)
                try:
                    return run(input_batch, states, step, **kwargs)
                except Exception as error:
                    if not isinstance(getattr(error, "inner_exception", error), NotBatched):
                        raise
                    log.warning("requests of these sizes are computed one after another: %s", error)
                    self._apart.add(sizes)
                    if step.calls > 1:  # a branch of guidance has taken this step: it is full then, for all branches
                        for state in states:
                            hero_fx.session(state.request_id).drop()
            from vllm_omni.diffusion.worker.input_batch import InputBatch

            found = [
                run(InputBatch.make_batch([state]), [state], Step([state], named=as_rows), **kwargs) for state in states
            ]
            return None if any(rows is None for rows in found) else torch.cat(found)

        return denoise_step


def _alike(batch: Any, states: Sequence[Any]) -> bool:
    """Whether requests are rows of one program: as many rows and the same grid each, and no text that was padded for others."""
    rows = {state.latents.shape[0] for state in states}
    grids = batch.img_shapes or [None]
    masks = (batch.prompt_embeds_mask, batch.negative_prompt_embeds_mask)
    return (
        len(rows) == 1
        and all(grid == grids[0] for grid in grids)
        and all(mask is None or bool(mask.all()) for mask in masks)
    )


def _sizes(batch: Any, requests: int) -> tuple[Any, ...]:
    """Of the inputs of each of so many requests that are alike."""
    tensors = (batch.latents, batch.prompt_embeds, batch.negative_prompt_embeds, batch.guidance, batch.image_latents)
    shapes = [None if tensor is None else (tensor.shape[0] // requests, *tensor.shape[1:]) for tensor in tensors]
    return *shapes, str((batch.img_shapes or [None])[0]), batch.do_true_cfg
