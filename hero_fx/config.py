"""The options of `hero_fx.backend`, validated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch

from hero_fx.passes.rewrite.plan import CachePoint, Keys, Text, Unsampled

from .plan import Plan, Timeline, as_plan
from .policy import DuCa, Fora, Forecast, Hero, Policy, TaylorSeer, ToCa
from .schedule import Schedule, make_schedule
from .stages import OPTIONAL

__all__ = ["Config"]

_POLICIES = ("hero", "lean", "fora", "taylorseer", "toca", "duca", "forecast", "full")
_INNER = ("inductor", "aot_eager", "eager")
_OBJECT = "a policy object"
_SAMPLED = ("hero", "lean", _OBJECT)
# Which policies an option means something to; options that are not named here mean something to all.
_USED_BY = {
    "refresh_layers": ("hero", "lean"),
    "refresh_ratio": (*_SAMPLED, "toca", "duca"),
    "patch": _SAMPLED,
    "order": ("hero", "lean", "taylorseer"),
    "selection": ("hero",),
    "keys": ("hero",),
    "text": ("hero", "lean", "toca", "duca"),
    "cache_point": ("hero", "fora", "taylorseer", "toca", "duca"),
    "unsampled": ("hero", "lean"),
    "age_weighting": _SAMPLED,
    "seed": _SAMPLED,
    "grid": (*_SAMPLED, "toca", "duca"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Every option of `hero_fx.backend`; see there for what they mean together."""

    policy: str | Policy = "hero"
    """`"hero"`, `"lean"` (HERO with the least state), `"fora"`, `"taylorseer"`, `"toca"`, `"duca"`, `"forecast"` (needs a
    plan), `"full"`, or an object.
    `"full"` is plain compilation: every step is full, whatever the schedule, and there is no state."""
    interval: int = 2
    """N: a full step every N steps."""
    schedule: str | Sequence[object] = "uniform"
    """`"uniform"`, `"toca"` (needs `num_steps`), or T truth values, true = full step."""
    num_steps: int | None = None
    """T, the number of denoising steps; lets the last `cooldown` steps be full."""
    warmup: int = 3
    """The first steps that are full."""
    cooldown: int = 1
    """The last steps that are full; without `num_steps` the end is not known and none is forced."""
    refresh_layers: int | float = 0.5
    """M, the layers with patch-wise refresh: a count, or a float as share of depth."""
    refresh_ratio: float = 1 / 6
    """alpha: the share of image tokens that a cached step recomputes."""
    patch: tuple[int, int, int] = (1, 2, 3)
    """(frames, height, width) of the patches that tokens are sampled from."""
    order: int = 1
    """Order of the extrapolation; 1 is Eq. 6."""
    selection: str = "per_step"
    """`"per_step"`: one selection for all layers; `"per_layer"`: one for each."""
    keys: Keys | None = None
    """What refreshed tokens attend to: `"sampled"`, `"sampled+text"`, `"landmarks"` (also one cached token per patch),
    `"all"`; None: hero `"all"`, lean `"sampled"`."""
    text: Text = "skip"
    """`"skip"`: text does what tokens that are not sampled do; `"live"`: text tokens are recomputed with the sampled ones."""
    cache_point: str | tuple[str, str] | None = None
    """`"pre_gate"`, `"post_gate"`, or a pair for (shallow, deep); None: hero post-gate in both, with `unsampled="reuse"`
    `("pre_gate", "post_gate")`, others pre."""
    unsampled: Unsampled | None = None
    """What shallow tokens that are not sampled do: `"reuse"` (the paper), `"extrapolate"`, or follow the `"gate"`; None:
    hero `"extrapolate"`, lean `"reuse"`."""
    age_weighting: bool = True
    """Sample tokens with a probability that grows with their age; false: uniformly."""
    state_dtype: torch.dtype | None = None
    """Dtype of the feature state: a floating-point one, or `torch.int8` with a scale per token; None: the features' own."""
    form: str = "collapsed"
    """`"collapsed"`: after exact algebra, gathers once, scatters once, sums caches; `"literal"`: a cache per branch."""
    grid: tuple[int, int, int] | None = None
    """(frames, height, width) of the image tokens, where the graph does not show it."""
    timestep: str | int | None = None
    """The argument with the diffusion time, by name or position among the graph's inputs; None: found."""
    seed: int = 0
    """Seed of the sampling: the same seed gives the same video."""
    inner: str | Callable[..., Any] = "inductor"
    """What compiles the rewritten graphs: `"inductor"`, `"aot_eager"`, `"eager"`, or a backend callable."""
    mode: str | None = None
    """Inductor's mode, as in `torch.compile(mode=...)`."""
    options: Mapping[str, Any] | None = field(default=None, hash=False)
    """Inductor's options, as in `torch.compile(options=...)`."""
    plan: Plan | str | Path | None = None
    """A calibrated plan, or the path of one: it decides policy, schedule, `num_steps` and its own options."""
    plan_mismatch: str = "error"
    """Where the model or a call is not what the plan was calibrated on: `"error"`, or `"warn"` and go on."""
    disable_passes: Sequence[str] = ()
    """Names of passes that are left out, to find the one at fault: any that preserves numerics (`hero_fx.stages.OPTIONAL`)."""
    strict: bool = True
    """True: a model that cannot be accelerated is an error; false: one warning, and plain compilation."""

    def __post_init__(self) -> None:
        if self.plan is not None:
            self._follow(as_plan(self.plan))
        elif self.policy == "forecast":
            raise ValueError(
                "policy='forecast' needs a plan, for its coefficients are calibrated: plan=hero_fx.calibrate(...), or its path"
            )
        _one_of("plan_mismatch", self.plan_mismatch, ("error", "warn"))
        if isinstance(self.policy, str):
            _one_of("policy", self.policy, _POLICIES, "or a policy object")
            self._no_idle_options(self.policy)
        elif isinstance(self.policy, type) or not isinstance(self.policy, Policy):
            raise ValueError(
                f"policy={self.policy!r} is neither a name ({', '.join(_POLICIES)}) nor an object with name, steps and kind"
            )
        else:
            self._no_idle_options(_OBJECT)
        _count("interval", self.interval, 1)
        _count("warmup", self.warmup, 1)
        _count("cooldown", self.cooldown, 0)
        if self.num_steps is not None:
            _count("num_steps", self.num_steps, 1)
        _count("order", self.order, 0)
        most = 1.0 if isinstance(self.refresh_layers, float) else math.inf
        if not _is_number(self.refresh_layers) or not 0 <= self.refresh_layers <= most:
            raise ValueError(
                f"refresh_layers={self.refresh_layers!r} must be a count from 0 to the depth, or a float from 0.0 to 1.0 "
                "as share of the depth"
            )
        if not _is_number(self.refresh_ratio) or not 0 < self.refresh_ratio <= 1:
            raise ValueError(f"refresh_ratio={self.refresh_ratio!r} must be above 0 and at most 1, such as 1/6")
        _triple("patch", self.patch)
        if self.grid is not None:
            _triple("grid", self.grid)
        _one_of("selection", self.selection, ("per_step", "per_layer"))
        if self.keys is not None:
            _one_of("keys", self.keys, get_args(Keys))
        _one_of("text", self.text, get_args(Text))
        if self.unsampled is not None:
            _one_of("unsampled", self.unsampled, get_args(Unsampled))
        _one_of("form", self.form, ("collapsed", "literal"))
        points = self.cache_point if isinstance(self.cache_point, tuple) else (self.cache_point,)
        if isinstance(self.cache_point, tuple) and len(points) != 2:
            raise ValueError(f"cache_point={self.cache_point!r} must be one value or a pair for (shallow, deep) layers")
        for point in points:
            if point is not None or isinstance(self.cache_point, tuple):
                _one_of("cache_point", point, get_args(CachePoint), "or a pair of them for (shallow, deep)")
        if isinstance(self.cache_point, tuple) and self.policy != "hero":
            raise ValueError(
                f"cache_point={self.cache_point!r}: only policy='hero' has shallow and deep layers; give one value"
            )
        if self.unsampled == "gate" and points[0] == "pre_gate":
            raise ValueError(
                f"cache_point={self.cache_point!r}: unsampled='gate' is for shallow caches behind the gate, in front of it the "
                "live gate is applied anyway; leave cache_point out, or give 'post_gate'"
            )
        dtype = self.state_dtype
        if dtype is not None and not (
            isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype is torch.int8)
        ):
            raise ValueError(f"state_dtype={dtype!r} must be a floating-point torch.dtype, torch.int8 or None")
        if dtype is torch.int8 and self.policy == "forecast":
            raise ValueError(f"state_dtype={dtype!r}: outputs have no tokens to scale by; give a floating-point dtype")
        if self.timestep is not None and not isinstance(self.timestep, str):
            _count("timestep", self.timestep, 0, "as a position among the graph's inputs; or give the argument's name")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed={self.seed!r} must be a whole number")
        unknown = [name for name in self.disable_passes if name not in OPTIONAL]
        if unknown or isinstance(self.disable_passes, str):
            raise ValueError(
                f"disable_passes={self.disable_passes!r} must be names of passes that preserve numerics: "
                f"{', '.join(sorted(OPTIONAL))}"
            )
        for name in ("age_weighting", "strict"):
            _one_of(name, getattr(self, name), (True, False))
        if not callable(self.inner):
            _one_of("inner", self.inner, _INNER, "or a backend callable")
        if self.inner != "inductor" and (self.mode or self.options):
            raise ValueError(
                f"mode={self.mode!r} and options={self.options!r} are Inductor's; with inner={self.inner!r} leave them out"
            )
        for name, default in (("warmup", 3), ("cooldown", 1)):
            if self.schedule != "uniform" and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with schedule={self.schedule!r}; it is for 'uniform': "
                    "leave it out"
                )
        if not isinstance(self.schedule, str) and self.interval != 2 and self.policy not in ("toca", "duca"):
            raise ValueError(
                f"interval={self.interval!r} has no effect with a schedule that is given step by step; leave it out"
            )
        self.make_schedule()

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Config:
        """A configuration from a dict of options, as `torch.compile(backend="hero_fx", options=...)` passes it."""
        names = [f.name for f in fields(cls)]
        unknown = [name for name in options if name not in names]
        if unknown:
            raise ValueError(
                f"unknown option{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))} for backend 'hero_fx'; allowed are "
                f"{', '.join(names)} (Inductor's own options go into options={{'options': {{...}}}})"
            )
        return cls(**options)

    def make_schedule(self) -> Schedule:
        """Which steps are full."""
        return self.schedule_of(None)

    def schedule_of(self, num_steps: int | None) -> Schedule:
        """Which steps of a trajectory of `num_steps` are full; None: as many as the options say."""
        return make_schedule(
            self.schedule,
            interval=self.interval,
            num_steps=self.num_steps if num_steps is None else num_steps,
            warmup=self.warmup,
            cooldown=self.cooldown,
        )

    def make_policy(self) -> Policy | None:
        """The policy object; None for `"full"`, which rewrites nothing."""
        point: Any = self.cache_point
        unsampled = self.unsampled or ("extrapolate" if self.policy == "hero" else "reuse")
        first = "pre_gate" if unsampled == "reuse" else "post_gate"
        shallow, deep = point if isinstance(point, tuple) else (point or first, point or "post_gate")
        match self.policy:
            case "hero":
                return Hero(
                    refresh_layers=self.refresh_layers,
                    order=self.order,
                    keys=self.keys or "all",
                    stride=math.prod(self.patch),
                    text=self.text,
                    cache_point=(shallow, deep),
                    unsampled=unsampled,
                    per_layer=self.selection == "per_layer",
                )
            case "lean":
                return Hero(
                    refresh_layers=self.refresh_layers,
                    order=self.order,
                    keys="sampled",
                    text=self.text,
                    cache_point=("post_gate", "post_gate"),
                    unsampled=unsampled,
                    name="lean",
                )
            case "fora":
                return Fora(cache_point=shallow)
            case "taylorseer":
                return TaylorSeer(order=self.order, cache_point=shallow)
            case "toca":
                return ToCa(ratio=self.refresh_ratio, interval=self.interval, text=self.text, cache_point=shallow)
            case "duca":
                return DuCa(ratio=self.refresh_ratio, interval=self.interval, text=self.text, cache_point=shallow)
            case "forecast":
                assert isinstance(self.plan, Plan)
                return Forecast(outputs=self.plan.outputs)
            case "full":
                return None
        assert isinstance(self.policy, Policy)
        return self.policy

    @property
    def timeline(self) -> Timeline | None:
        """The part of the plan that is for this number of steps; None without a plan."""
        return self.plan.timeline(self.num_steps) if isinstance(self.plan, Plan) else None

    def _follow(self, plan: Plan) -> None:
        """Takes over what the plan decides; what was given beside it must agree."""
        timeline = plan.timeline(self.num_steps)
        decided = {
            "policy": plan.policy,
            **plan.options,
            "schedule": timeline.schedule,
            "num_steps": timeline.num_steps,
        }
        defaults = {f.name: f.default for f in fields(Config)}
        for name, value in decided.items():
            given = getattr(self, name)
            if name == "schedule" and not isinstance(given, str) and isinstance(given, Sequence):
                given = tuple(map(bool, given))
            if given not in (defaults[name], value):
                raise ValueError(f"{name}={given!r}: the plan was calibrated for {value!r}; leave it out beside plan=")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "plan", plan)

    def _no_idle_options(self, policy: str) -> None:
        """An option that the policy does not look at must not be set: it would be ignored in silence."""
        defaults = {f.name: f.default for f in fields(Config)}
        for name, users in _USED_BY.items():
            value = getattr(self, name)
            if policy not in users and value != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} has no effect with policy={policy!r}; it is for "
                    f"{', '.join(map(repr, users))}: leave it out"
                )


def _one_of(name: str, value: object, allowed: Sequence[object], more: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{' ' + more if more else ''}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(name: str, value: object, least: int, more: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{' ' + more if more else ''}")


def _triple(name: str, value: object) -> None:
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 3
        or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in value)
    ):
        raise ValueError(
            f"{name}={value!r} must be three whole numbers (frames, height, width) of at least 1, such as (1, 2, 3)"
        )
