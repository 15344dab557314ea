"""One model in one process: trajectories take turns step by step, and end when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import TracebackType
from typing import Any

from .messages import Limits, Request, line, pack
from .models import Model

__all__ = ["Engine", "Turns"]


class _Stopped(Exception):
    """Nobody waits for this trajectory any more."""


class Turns:
    """A lock that is handed on in the order of arrival. (`threading.Lock` goes to whoever is quick: to the one that just
    left it.)"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        turn = threading.Event()
        with self._lock:
            self._waiting.append(turn)
            if len(self._waiting) == 1:
                turn.set()
        turn.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].set()

    def hand_on(self) -> None:
        """Lets all others that wait go first."""
        self.__exit__(None, None, None)
        self.__enter__()


class Engine:
    """Runs the requests of one process.

    Each has a thread of its own, which runs the pipeline's loop and gives way after each step: so one step is computed at a
    time, with all processors, and each call of the model is made in the thread that says whose it is. `live` trajectories take
    turns; further ones wait for a thread in the order in which they came.
    """

    def __init__(self, models: Mapping[str, Model], limits: Limits, live: int) -> None:
        """
        Raises:
            ValueError: `live` requests need more feature state than `max_state_bytes`: some would be evicted, and their
                results would not be those of the request alone.
        """
        self._models, self.limits, self.live = models, limits, live
        self._threads = ThreadPoolExecutor(live, thread_name_prefix="trajectory")
        self._turns = Turns()
        self._counts: Counter[str] = Counter(done=0, cancelled=0, failed=0, live=0)
        self._lock = threading.Lock()
        for model in models.values():
            need, most = model.warm_up(), model.max_state_bytes
            if most is not None and live * need > most:
                raise ValueError(
                    f"live={live} requests for {model.task} need {live} x {need} bytes of feature state, and "
                    f"max_state_bytes={most}: lower live to {most // need}, or raise max_state_bytes"
                )

    async def denoise(self, request: Request) -> AsyncIterator[str]:
        """The lines of the reply.

        Closing or cancelling this generator stops the trajectory after the step that runs, and frees its session.

        Raises:
            Exception: what the model raised.
        """
        loop, told, stop = asyncio.get_running_loop(), asyncio.Queue[str | Exception | None](), threading.Event()

        def tell(event: str | Exception | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, event)

        waiting = self._threads.submit(self._run, request, tell, stop)
        try:
            while (event := await told.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            stop.set()
            if waiting.cancel():  # it had not begun
                self._count(cancelled=1)

    def _run(self, request: Request, tell: Callable[[str | Exception | None], None], stop: threading.Event) -> None:
        model, last, outcome = self._models[request.task], list[str | Exception](), "done"
        self._count(live=1)

        def step_is_done(step: int) -> None:
            tell(line("step", step=step + 1, steps=request.steps))
            self._turns.hand_on()
            if stop.is_set():
                raise _Stopped

        try:
            with self._turns:
                arrays = model.run(request, step_is_done)
            last.append(line("result", id=request.id, npz=pack(arrays)))
        except _Stopped:
            outcome = "cancelled"
        except Exception as error:
            outcome = "failed"
            last.append(error)
        # Only now, when its last call is over, and before anybody hears of the end.
        model.drop(request)
        self._count(live=-1, **{outcome: 1})
        for event in (*last, None):
            tell(event)

    def _count(self, **changes: int) -> None:
        with self._lock:
            self._counts.update(changes)

    def stats(self) -> dict[str, Any]:
        """Requests by outcome, and what the backend of each task counts; see `hero_fx.Stats`."""
        with self._lock:
            requests = dict(self._counts)
        return {
            "requests": requests,
            "tasks": {
                task: asdict(model.backend.stats()) for task, model in self._models.items() if model.backend is not None
            },
        }
