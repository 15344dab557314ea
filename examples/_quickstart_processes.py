"""The ways in which the quickstart runs its model, each in a process of its own: they compile beside each other, and denoise in
turns.

Nothing here imports torch, so that the processes start at once. On Linux they are forked from one that has imported what all
of them need and has done nothing else; elsewhere each imports it.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

__all__ = ["Apart", "Here", "Settings"]

NEEDED = ["hero_fx", "diffusers.models.transformers.cogvideox_transformer_3d", "diffusers.pipelines.pipeline_utils"]
"""What takes long to import."""


@dataclass(frozen=True)
class Settings:
    """What all ways have in common."""

    weights: Path
    task: str
    steps: int
    scenes: int
    inner: str


class Here:
    """A way in this process, which answers before it returns."""

    def __init__(self, name: str, settings: Settings, options: dict[str, Any] | None) -> None:
        """`options`: of `hero_fx.backend`; None for plain `torch.compile`."""
        self.name = name
        self._runner = _runner(name, settings, options)

    def ask(self, question: str) -> Future[Any]:
        """What a method of `Runner` returns."""
        answer: Future[Any] = Future()
        answer.set_result(getattr(self._runner, question)())
        return answer

    def close(self) -> None:
        """Nothing is left to end."""


class Apart:
    """A way in a process of its own, which lives until it is closed."""

    def __init__(self, name: str, settings: Settings, options: dict[str, Any] | None) -> None:
        """`options`: of `hero_fx.backend`; None for plain `torch.compile`."""
        self.name = name
        self._makes = name, settings, options
        self._process = ProcessPoolExecutor(1, mp_context=_context())

    def ask(self, question: str) -> Future[Any]:
        """What a method of `Runner` returns, once it is there."""
        return self._process.submit(_answer, self._makes, question)

    def close(self) -> None:
        """Ends the process once it has answered; waits for neither."""
        self._process.shutdown(wait=False, cancel_futures=True)


def _context() -> Any:
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context


_held: list[Any] = []
"""The `Runner` of this process, where it is one of `Apart`."""


def _answer(makes: tuple[str, Settings, dict[str, Any] | None], question: str) -> Any:
    if not _held:
        _held.append(_runner(*makes))
    return getattr(_held[0], question)()


def _runner(name: str, settings: Settings, options: dict[str, Any] | None) -> Any:
    from _quickstart_ways import Runner

    return Runner(name, settings, options)
