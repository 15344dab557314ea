"""Policies: what each branch does at a cached step.

A policy looks at the structure of a model (layers and their branches) and never at features, so all decisions of a
trajectory are known before it starts. HERO is one policy; the methods it is compared with are others, on the same
passes. A policy of your own is any frozen object with the three members of `Policy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hero_fx.passes.analysis.structure import Branch, Structure
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.passes.rewrite.plan import (
    CachePoint,
    Extrapolate,
    Keys,
    Refresh,
    Reuse,
    ScoredRefresh,
    StepPlan,
    Strategy,
    Text,
    Unsampled,
)

__all__ = ["DuCa", "Fora", "Forecast", "Hero", "Policy", "TaylorSeer", "ToCa", "boundary"]


@runtime_checkable
class Policy(Protocol):
    """What a policy must say."""

    @property
    def name(self) -> str:
        """Short name for tables and messages."""

    def steps(self, structure: Structure) -> tuple[StepPlan, ...]:
        """One plan per kind of cached step: each branch of the structure, in order, with its strategy."""

    def kind(self, since_full: int) -> int:
        """Which of the plans a cached step uses that is `since_full` (1, 2, ...) steps behind the last full one."""


def boundary(refresh_layers: int | float, depth: int) -> int:
    """M, the number of shallow layers: a count as it is, a float as share of the depth, rounded.

    Raises:
        ValueError: more shallow layers than layers.
    """
    if isinstance(refresh_layers, float):
        return int(refresh_layers * depth + 0.5)
    if refresh_layers > depth:
        raise ValueError(
            f"refresh_layers={refresh_layers} is beyond the model's depth of {depth} layers; give a count from 0 to "
            f"{depth}, or a share of the depth such as 0.5"
        )
    return refresh_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class _OneKind(ABC):
    """A policy whose cached steps are all alike."""

    def kind(self, since_full: int) -> int:
        return 0

    def steps(self, structure: Structure) -> tuple[StepPlan, ...]:
        return (tuple((branch, self.strategy(branch, structure)) for branch in structure.branches),)

    @abstractmethod
    def strategy(self, branch: Branch, structure: Structure) -> Strategy:
        """What is done with a branch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hero(_OneKind):
    """HERO: patch-wise refresh in layers 0..M-1 (Eq. 4-5), linear extrapolation in the rest (Eq. 6).

    By default tokens that a refresh leaves out are extrapolated as well; Eq. 4 is `unsampled="reuse"`.
    """

    refresh_layers: int | float = 0.5
    order: int = 1
    keys: Keys = "all"
    stride: int = 6
    """With keys "landmarks": one image token in so many is one."""
    text: Text = "skip"
    cache_point: tuple[CachePoint, CachePoint] = ("post_gate", "post_gate")
    """Of shallow and of deep layers."""
    unsampled: Unsampled = "extrapolate"
    per_layer: bool = False
    """Draw one selection per layer instead of one per step."""
    name: str = "hero"

    def strategy(self, branch: Branch, structure: Structure) -> Strategy:
        shallow, deep = self.cache_point
        if branch.layer >= boundary(self.refresh_layers, structure.depth):
            return Extrapolate(order=self.order, cache_point=deep)
        return Refresh(
            cache_point=shallow,
            keys=self.keys,
            stride=self.stride,
            text=self.text,
            unsampled=self.unsampled,
            per_layer=self.per_layer,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fora(_OneKind):
    """FORA: every branch reuses the features of the last full step."""

    cache_point: CachePoint = "pre_gate"
    name: str = "fora"

    def strategy(self, branch: Branch, structure: Structure) -> Strategy:
        return Reuse(cache_point=self.cache_point)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaylorSeer(_OneKind):
    """TaylorSeer: every branch is extrapolated by a Taylor polynomial of finite differences."""

    order: int = 1
    cache_point: CachePoint = "pre_gate"
    name: str = "taylorseer"

    def strategy(self, branch: Branch, structure: Structure) -> Strategy:
        return Extrapolate(order=self.order, cache_point=self.cache_point)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToCa(_OneKind):
    """ToCa: attention reuses its features, FFNs recompute the tokens that received most attention at the full step."""

    ratio: float = 0.25
    interval: int = 2
    text: Text = "skip"
    cache_point: CachePoint = "pre_gate"
    name: str = "toca"

    def strategy(self, branch: Branch, structure: Structure) -> Strategy:
        if branch.kind != "ffn":
            return Reuse(cache_point=self.cache_point)
        image = any(structure.image in structure.streams[u.stream].tokens.sources for u in branch.updates)
        if not image and self.text == "skip":
            return Reuse(cache_point=self.cache_point)
        return ScoredRefresh(
            cache_point=self.cache_point, text=self.text, ratio=self.ratio, score="attention", interval=self.interval
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DuCa:
    """DuCa: steps of ToCa with the score `1 - |v|` (no attention map), in turn with steps that reuse everything."""

    ratio: float = 0.25
    interval: int = 2
    text: Text = "skip"
    cache_point: CachePoint = "pre_gate"
    name: str = "duca"

    def steps(self, structure: Structure) -> tuple[StepPlan, ...]:
        toca = ToCa(ratio=self.ratio, interval=self.interval, text=self.text, cache_point=self.cache_point)
        refresh: list[tuple[Branch, Strategy]] = []
        for branch, strategy in toca.steps(structure)[0]:
            if isinstance(strategy, ScoredRefresh):
                strategy = ScoredRefresh(
                    cache_point=self.cache_point,
                    text=self.text,
                    ratio=self.ratio,
                    score="values",
                    interval=self.interval,
                )
            refresh.append((branch, strategy))
        return tuple(refresh), Fora(cache_point=self.cache_point).steps(structure)[0]

    def kind(self, since_full: int) -> int:
        return 0 if since_full % 2 else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Cached steps forecast the model's outputs by a plan's coefficients: no branch is looked at, no layer runs."""

    outputs: tuple[OutputRule, ...]
    parts: int = 1
    """Equal parts of the batch that run by themselves, each at full steps of its own."""
    name: str = "forecast"

    def steps(self, structure: Structure) -> tuple[StepPlan, ...]:
        """No plan for branches."""
        return ()

    def kind(self, since_full: int) -> int:
        """There is one kind of cached step."""
        return 0
