"""Telling models apart that share compiled code.

Dynamo makes the weights of a model inputs of its graph, so that two models of one class run the same code. What each of
them left in feature state is its own: a model is known by the weights that a call brings.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Model", "Weights"]


@dataclass(frozen=True, eq=False, slots=True)
class Model:
    """One set of weights that a compiled graph was called with."""

    number: int
    """From 0, in the order of their first calls."""
    ids: frozenset[int] = field(repr=False)
    """Ids of its weights, which are alive as long as the model is known."""
    _alive: tuple[weakref.ref[torch.Tensor], ...] = field(repr=False)
    _modules: weakref.WeakKeyDictionary[torch.nn.Module, bool] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )

    def shares(self, other: Model) -> bool:
        """Whether both have a weight in common; graphs of one model do."""
        return not self.ids.isdisjoint(other.ids)

    def is_of(self, module: torch.nn.Module) -> bool:
        """Whether a module has one of the weights."""
        if module not in self._modules:
            tensors = itertools.chain(module.parameters(), module.buffers())
            self._modules[module] = any(id(t) in self.ids for t in tensors)
        return self._modules[module]


class Weights:
    """The models that call one compiled graph."""

    def __init__(self, positions: Sequence[int], forget: Callable[[Model], None]) -> None:
        """`positions` of the weights among the graph's inputs; `forget` is called when a model's weights are gone."""
        self._positions = tuple(positions)
        self._parameters: tuple[int, ...] | None = None
        self._forget = forget
        self._known: dict[tuple[int, ...], Model] = {}
        self._lock = threading.RLock()  # a weight may die, and call back, while it is held

    def model(self, inputs: Sequence[Any]) -> Model:
        """The model that a call is of."""
        with self._lock:
            if self._parameters is None:
                # Buffers may be made anew; where there are parameters, they are what a model is known by.
                parameters = tuple(p for p in self._positions if isinstance(inputs[p], torch.nn.Parameter))
                self._parameters = parameters or self._positions
            key = tuple(id(inputs[p]) for p in self._parameters)
            if key not in self._known:
                gone = _Gone(weakref.ref(self), key)
                alive = tuple(weakref.ref(inputs[p], gone) for p in self._parameters)
                number = max((m.number for m in self._known.values()), default=-1) + 1
                self._known[key] = Model(number, frozenset(key), alive)
            return self._known[key]

    def _drop(self, key: tuple[int, ...]) -> None:
        with self._lock:
            model = self._known.pop(key, None)
        if model is not None:
            self._forget(model)


@dataclass(frozen=True, slots=True)
class _Gone:
    """Called when a weight of a model is gone."""

    weights: weakref.ref[Weights]
    key: tuple[int, ...]

    def __call__(self, _: object) -> None:
        weights = self.weights()
        if weights is not None:
            weights._drop(self.key)
