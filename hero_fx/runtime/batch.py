"""Several requests in one call: what is said of each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType

import torch

from hero_fx.arguments import whole_number

from .calling import Calling, current_calling
from .leaving import leave

__all__ = ["CODE", "Batch", "batch", "current_batch", "only_call"]

CODE = (
    "the model runs code that was compiled outside of hero_fx.batch(...) within one, or the other way round: hero_fx tells the "
    "two apart by whether autocast keeps casts, which was changed here by torch.autocast(cache_enabled=...) or "
    "torch.set_autocast_cache_enabled(...); leave it the same for all calls of the model"
)
"""What is said where code that was compiled for one request is run in a batch."""

_BATCH: ContextVar[Batch | None] = ContextVar("hero_fx_batch", default=None)


@dataclass(eq=False, slots=True)
class Batch:
    """What is said of the requests in one call; see `batch`."""

    calls: tuple[Calling, ...]
    buckets: tuple[int, ...]
    _token: Token[Batch | None] | None = None
    _own_code: ExitStack = field(default_factory=ExitStack)
    _seen: set[int] = field(default_factory=set)

    def __enter__(self) -> Batch:
        if current_calling() is not None or _BATCH.get() is not None:
            raise RuntimeError(
                "hero_fx.batch is entered within another hero_fx.batch or hero_fx.calling: leave that one first"
            )
        for call in self.calls:
            call.spend()
        self._token = _BATCH.set(self)
        if len(self.calls) > 1:  # one request runs the code that was compiled for one
            self._own_code.enter_context(_code_of_its_own())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        self._own_code.close()
        leave("batch", _BATCH, self._token, failed=kind is not None)

    def use(self, model: int) -> None:
        """Notes a call of a model. Raises RuntimeError at the second one."""
        if model in self._seen:
            raise RuntimeError(
                "the model was called twice within one hero_fx.batch(...): it is for one call; enter another one for each"
            )
        self._seen.add(model)

    def bucket(self, count: int) -> int:
        """The least bucket that holds `count` requests."""
        return next(size for size in self.buckets if size >= count)


@contextmanager
def _code_of_its_own() -> Iterator[None]:
    """Within it Dynamo runs no code that was compiled outside of it, nor the other way round.

    Dynamo's guards look at whether autocast keeps the casts of weights. No value depends on that, and step graphs run with
    autocast off: so it is what tells the two kinds of code apart.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(not before)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def batch(calls: Sequence[Calling], *, buckets: Sequence[int] = (2, 4, 8)) -> Batch:
    """Says that one call of a compiled model is of several requests, each at a step of its own.

    ::

        with hero_fx.batch(
            [
                hero_fx.calling(session="request-42", step_index=3, num_steps=50),
                hero_fx.calling(session="request-43", step_index=17, num_steps=30),
            ]
        ):
            noise = model(latents, timestep=timesteps)  # latents [2, ...], timesteps [2]

    The batch holds equally many rows for each request, in the order of `calls`: `n` requests whose calls have `b` rows each
    make a batch of `n * b`, request `i` in the rows `i * b` to `(i + 1) * b - 1`. Inputs that have the same shape for one
    request and for the batch are shared by all. Each request has its own session, lane, step and feature state, as if it were
    called alone: some may be at a full step while others are at a cached one, and it may be called alone, or in another
    batch, at its next step. Those at a step of the same kind are computed together, padded to a bucket.

    What runs is the step graph of one request, mapped over requests, so rows cannot act on each other. The model must have
    been called for one request alone before (within `calling`, `batch` of one, or as a warm-up), at each resolution.

    Args:
        calls: one `hero_fx.calling(...)` for each request, with `session` and `step_index`; two of one session also with
            `lane`, where the unconditional rows are rows of their own.
        buckets: numbers of requests, 2 or more, that step graphs are compiled for when they are first needed. A single
            request runs in its own; more than the largest bucket are computed in several parts.

    Raises:
        ValueError: an argument is out of range; two calls are of one session and lane, or of one session at two steps.
        RuntimeError: on entering, within another `batch` or `calling`; at the call, for the second call of one model.
    """
    calls, buckets = tuple(calls), tuple(buckets)
    if not calls or not all(isinstance(call, Calling) for call in calls):
        raise ValueError(f"calls={list(calls)!r} must be one hero_fx.calling(...) for each request of the batch")
    for i, call in enumerate(calls):
        for name in ("session", "step_index"):
            if getattr(call, name) is None:
                raise ValueError(
                    f"calls[{i}] has no {name}: give hero_fx.calling(session=..., step_index=...) in a batch"
                )
    for size in buckets:
        whole_number("buckets", size, 2)
    if not buckets:
        raise ValueError("buckets=() must have at least one number of requests, such as (2, 4, 8)")
    steps: dict[str, int] = {}
    lanes = set()
    for call in calls:
        assert call.session is not None
        assert call.step_index is not None
        if (call.session, call.lane) in lanes:
            raise ValueError(
                f"two calls of the batch are of session={call.session!r} and lane={call.lane!r}: each call of a step needs a "
                "lane of its own, hero_fx.calling(lane=...)"
            )
        lanes.add((call.session, call.lane))
        if steps.setdefault(call.session, call.step_index) != call.step_index:
            raise ValueError(
                f"session={call.session!r} is in the batch with step_index={steps[call.session]} and "
                f"step_index={call.step_index}: a request is at one step"
            )
    return Batch(calls, tuple(sorted(set(buckets))))


def current_batch() -> Batch | None:
    """What is said of the requests of this call, if anything is."""
    return _BATCH.get()


def only_call() -> Calling | None:
    """What is said of this call of one request, if anything is."""
    said = _BATCH.get()
    return current_calling() if said is None else said.calls[0]
