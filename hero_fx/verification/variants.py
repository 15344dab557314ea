"""Variants of options for `verify`: a short schedule, plain compilation, and policies that leave nothing out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hero_fx.config import Config
from hero_fx.passes.analysis.structure import Branch, Structure
from hero_fx.passes.rewrite.plan import Extrapolate, Full, Refresh, ScoredRefresh, StepPlan, Strategy
from hero_fx.policy import Policy

__all__ = ["all_keys", "all_live", "altered", "plain", "short_schedule", "with_schedule"]


@dataclass(frozen=True, slots=True)
class _Altered:
    """A policy whose strategies are changed one by one."""

    policy: Policy
    change: Callable[[Strategy, StepPlan], Strategy]
    name: str = "altered"

    def steps(self, structure: Structure) -> tuple[StepPlan, ...]:
        return tuple(self._plan(plan) for plan in self.policy.steps(structure))

    def _plan(self, plan: StepPlan) -> StepPlan:
        rows: list[tuple[Branch, Strategy]] = [(branch, self.change(strategy, plan)) for branch, strategy in plan]
        return tuple(rows)

    def kind(self, since_full: int) -> int:
        return self.policy.kind(since_full)


def all_live(strategy: Strategy, plan: StepPlan) -> Strategy:
    """Everything is computed: with the refresh that some branch of the plan has, or as the model does."""
    example = strategy if isinstance(strategy, Refresh) else next((s for _, s in plan if isinstance(s, Refresh)), None)
    if isinstance(strategy, ScoredRefresh):
        return replace(strategy, ratio=1.0, text="live")
    if example is None:
        return Full()
    return replace(example, text="live", keys="all" if example.keys == "landmarks" else example.keys)


def all_keys(strategy: Strategy, plan: StepPlan) -> Strategy:
    """Refreshed tokens attend to all tokens, as in a full step."""
    return replace(strategy, keys="all") if isinstance(strategy, Refresh) else strategy


def altered(config: Config, change: Callable[[Strategy, StepPlan], Strategy], **options: Any) -> Config:
    """The options with a policy whose strategies are changed one by one, as the plan that each is part of says."""
    policy = config.make_policy()
    assert policy is not None
    return replace(config, policy=_Altered(policy, change), **{**_idle(keep=_SAMPLING), **options})


_SAMPLING = ("refresh_ratio", "patch", "age_weighting", "seed", "grid")
_POLICY = ("interval", "refresh_layers", "order", "selection", "keys", "text", "cache_point", "unsampled")


def _idle(keep: Sequence[str] = ()) -> dict[str, Any]:
    """Options that another policy, whose schedule is given step by step, has no use for, at their defaults."""
    defaults = Config()
    return {name: getattr(defaults, name) for name in (*_POLICY, *_SAMPLING) if name not in keep}


def short_schedule(config: Config, plans: Sequence[StepPlan]) -> list[bool]:
    """As many full steps as the extrapolation needs, cached ones of each kind, a full one, and cached ones again."""
    orders = [s.order for plan in plans for _, s in plan if isinstance(s, Extrapolate)]
    cached = [False] * max(len(plans), min(2, config.interval - 1))
    return [True] * (max([1, *orders]) + 1) + cached + [True] + cached


def with_schedule(config: Config, mask: Sequence[bool]) -> Config:
    """The options with another schedule, step by step."""
    spaced = config.policy in ("toca", "duca")
    defaults = Config()
    return replace(
        config,
        schedule=tuple(mask),
        num_steps=None,
        interval=config.interval if spaced else defaults.interval,
        warmup=defaults.warmup,
        cooldown=defaults.cooldown,
    )


def plain(config: Config) -> Config:
    """Compilation without step caching, by the same inner compiler."""
    return replace(config, policy="full", **_idle())
