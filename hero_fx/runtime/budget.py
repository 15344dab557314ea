"""A bound on the bytes of feature state that all sessions of a backend hold together."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Budget", "Holder", "OverBudget", "Store"]


MOST_EVICTED = 1024
"""Sessions without state whose place in the schedule is remembered; a server that never drops one would pile them up."""


class OverBudget(RuntimeError):
    """Feature state does not fit into `max_state_bytes`, and all that is held belongs to calls that run now."""


class Holder(Protocol):
    """What holds feature state: a session's trajectory."""

    used: int
    """Tick of its last call."""
    lock: threading.RLock
    running: int
    """Calls that run now."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def evict(self) -> None:
        """Frees the state; the next call of each lane is full."""

    def settle(self) -> None:
        """Frees the memory that it shared with holders that are gone."""


class Store(Protocol):
    """Where holders are."""

    def holders(self) -> Iterable[Holder]:
        """All there are now."""

    def forget(self, holder: Holder) -> None:
        """Forgets one, if it is here: the next call of its session starts a trajectory."""


class Budget:
    """Frees the state of the sessions that were used least recently, where another one needs room.

    What a session keeps when its state is freed is where it stands: its next step is full, and all goes on from there. Of
    those that were used least recently not even that is kept where there are more than `MOST_EVICTED`.
    """

    def __init__(self, most: int | None = None) -> None:
        """`most`: bytes; None is no bound."""
        self.most = most
        self.evictions = 0
        """Trajectories whose state was freed for another one's."""
        self._ticks = itertools.count(1)
        self._stores: weakref.WeakSet[Store] = weakref.WeakSet()
        self._lock = threading.RLock()

    def watch(self, store: Store) -> None:
        """Counts what a store holds, as long as it lives."""
        self._stores.add(store)

    def use(self, holder: Holder) -> None:
        """Notes a call."""
        holder.used = next(self._ticks)

    @contextmanager
    def room(self, nbytes: int, own: Holder) -> Iterator[None]:
        """Makes room for `nbytes` more of `own`, whose lock is held; they are allocated within, one holder at a time.

        Raises:
            OverBudget: there is none; nothing that could be freed is held any more.
        """
        if self.most is None:
            yield
            return
        with self._lock:
            self._free(nbytes, own, self.most)
            yield

    def _free(self, nbytes: int, own: Holder, most: int) -> None:
        holders = [holder for store in list(self._stores) for holder in store.holders()]
        held = sum(holder.nbytes for holder in holders)
        others = (holder for holder in holders if holder is not own and holder.nbytes and not holder.running)
        for holder in sorted(others, key=lambda other: other.used):
            if held + nbytes <= most:
                break
            if holder.lock.acquire(blocking=False):  # not while a call of it runs
                try:
                    holder.evict()
                    self.evictions += 1
                finally:
                    holder.lock.release()
                held = _settled(holders)
        self._forget([holder for holder in holders if holder is not own and not holder.nbytes])
        if held + nbytes > most:
            raise OverBudget(
                f"max_state_bytes={most}: a call needs {nbytes} bytes of feature state more, and {held} are held by "
                "its own trajectory or by calls that run now; raise max_state_bytes, or let fewer requests run at once"
            )

    def _forget(self, without: list[Holder]) -> None:
        """Forgets those without state that were used least recently, where there are too many."""
        without.sort(key=lambda holder: holder.used)
        for holder in without[: max(0, len(without) - MOST_EVICTED)]:
            for store in list(self._stores):
                store.forget(holder)


def _settled(holders: Sequence[Holder]) -> int:
    """The bytes that are held once none are for holders that are gone. No call uses its state while it asks for room."""
    for holder in holders:
        if holder.lock.acquire(blocking=False):
            try:
                holder.settle()
            finally:
                holder.lock.release()
    return sum(holder.nbytes for holder in holders)
