"""What a cached step does with each branch: the vocabulary between policies (which decide) and passes (which rewrite)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from hero_fx.passes.analysis.branch_tokens import BranchTokens
from hero_fx.passes.analysis.structure import Branch

__all__ = [
    "CachePoint", "Extrapolate", "Fallback", "Full", "Keys", "Recording", "Refresh", "Reuse", "ScoredBy", "ScoredRefresh",
    "StepPlan", "Strategy", "Text", "Unsampled", "recordings",
]  # fmt: skip

CachePoint = Literal["pre_gate", "post_gate"]
Keys = Literal["sampled", "sampled+text", "landmarks", "all"]
Text = Literal["skip", "live"]
Unsampled = Literal["reuse", "extrapolate", "gate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Full:
    """Compute the branch as the model does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """Add the features of the last full step (FORA)."""

    cache_point: CachePoint = "pre_gate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolate:
    """Estimate the features from those of the last full steps: sum over i <= order of Y_i x^i / i! (HERO Eq. 6)."""

    order: int = 1
    cache_point: CachePoint = "post_gate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Refresh:
    """Recompute sampled image tokens, take the cached features for all others (HERO Eq. 4)."""

    cache_point: CachePoint = "pre_gate"
    keys: Keys = "all"
    stride: int = 1
    """`keys="landmarks"`: one image token in so many is a landmark, whose keys and values are kept."""
    text: Text = "skip"
    unsampled: Unsampled = "reuse"
    """Tokens that are not sampled: keep the cached features (Eq. 4), extrapolate them (Eq. 6), or follow the change of the
    gate to first order: (g + x (g - g_prev) / d) F, for caches behind the gate."""
    per_layer: bool = False
    tokens: BranchTokens[str] | None = field(default=None, repr=False, compare=False)
    """Where the tokens are in the branch; `resolve` finds it."""


@dataclass(frozen=True, slots=True)
class ScoredBy:
    """Where tokens get their scores: the self-attention of the layer."""

    attention: str
    """The node."""
    start: int
    stop: int
    """The image tokens among its keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRefresh:
    """Recompute the image tokens with the highest scores, take the cached features for all others (ToCa, DuCa)."""

    cache_point: CachePoint = "pre_gate"
    text: Text = "skip"
    ratio: float = 0.25
    score: Literal["attention", "values"] = "attention"
    """Attention received (ToCa), or `1 - |v|` (DuCa)."""
    interval: int = 2
    """N of the staleness bonus 0.25 * age / N."""
    tokens: BranchTokens[str] | None = field(default=None, repr=False, compare=False)
    """As in `Refresh`."""
    scored_by: ScoredBy | None = field(default=None, repr=False, compare=False)
    """`resolve` finds it."""


Strategy = Full | Reuse | Extrapolate | Refresh | ScoredRefresh
StepPlan = tuple[tuple[Branch, Strategy], ...]


@dataclass(frozen=True, slots=True)
class Fallback:
    """A branch that cached steps compute in full although the policy wanted to refresh it, and why."""

    branch: str
    reason: str


@dataclass(frozen=True, slots=True)
class Recording:
    """What a full step keeps of one branch."""

    branch: Branch
    cache_point: CachePoint
    terms: int
    """Taylor terms Y_0 .. Y_{terms-1} per stream; 1 is the features alone."""
    gate: bool = False
    """Y_1 is the change of the gate times the features in front of it, not the change of the features."""
    keys: Refresh | None = None
    """Keep the keys and values of its attention that this reads: of all tokens, of the text tokens, or of these and of
    landmarks."""
    score: ScoredRefresh | None = None
    """Keep the scores that this chooses tokens by."""


def recordings(steps: Sequence[StepPlan]) -> tuple[Recording, ...]:
    """What full steps must keep so that all cached steps have what they read."""
    result = []
    for strategies in zip(*steps, strict=True):
        branch = strategies[0][0]
        wanted = [s for _, s in strategies if not isinstance(s, Full)]
        if not wanted:
            continue
        points = {s.cache_point for s in wanted}
        assert len(points) == 1, "all step kinds of a policy cache a branch at the same point"
        result.append(
            Recording(
                branch=branch,
                cache_point=points.pop(),
                terms=max(_terms(s) for s in wanted),
                gate=any(isinstance(s, Refresh) and s.unsampled == "gate" for s in wanted),
                keys=next((s for s in wanted if isinstance(s, Refresh) and s.keys != "sampled"), None),
                score=next((s for s in wanted if isinstance(s, ScoredRefresh)), None),
            )
        )
    return tuple(result)


def _terms(strategy: Strategy) -> int:
    if isinstance(strategy, Extrapolate):
        return strategy.order + 1
    return 2 if isinstance(strategy, Refresh) and strategy.unsampled != "reuse" else 1
