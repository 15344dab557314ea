"""The options of `hero_fx.backend`, validated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from hero_fx.passes.rewrite.plan import CachePoint, Keys, Text, Unsampled

from .plan import Plan, Timeline, as_plan
from .policy import DuCa, Fora, Forecast, Hero, Policy, TaylorSeer, ToCa
from .schedule import Schedule, make_schedule
from .validation import check_options

__all__ = ["Config"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Every option of `hero_fx.backend`.

    Args:
        policy: `"hero"`; `"lean"` (HERO with all caches behind the gates and no keys of other tokens: its state is three
            tensors of hidden states whatever the depth); a baseline on the same machinery (`"fora"`, `"taylorseer"`,
            `"toca"`, `"duca"`); `"forecast"` (cached steps run no layer and forecast the output by the coefficients of a
            plan, which it needs); `"full"` (plain compilation: every step is full, whatever the schedule, and there is no
            state); or an object with the members of `hero_fx.Policy`.
        interval: N; a full step every N steps. 1 makes every step full.
        schedule: `"uniform"`; `"toca"` (ToCa's varying interval, needs `num_steps`); or T truth values, true = full step.
        num_steps: T, the steps of a trajectory. Without it the end of a trajectory is not known, and `cooldown` has no
            effect.
        warmup: how many first steps are full (`schedule="uniform"`).
        cooldown: how many last steps are full (`schedule="uniform"`).
        refresh_layers: M, the layers with patch-wise refresh, as a count or as a float share of the depth.
        refresh_ratio: alpha, the share of image tokens recomputed at a cached step (for ToCa and DuCa: in FFNs).
        patch: (frames, height, width) in tokens of the patches in each of which a share alpha is sampled.
        order: order of the extrapolation (hero, lean, taylorseer); 1 is Eq. 6, linear.
        selection: `"per_step"`: sample tokens once for all layers; `"per_layer"`: once for each.
        keys: keys and values that refreshed tokens attend to: those of the sampled tokens (`"sampled"`), these and the text's
            from the last full step (`"sampled+text"`), these and one cached image token per patch (`"landmarks"`), or a
            cache of all, updated where sampled (`"all"`). Default: hero `"all"`, lean `"sampled"`.
        text: in shallow layers text tokens do what tokens that are not sampled do (`"skip"`), or are recomputed (`"live"`).
        cache_point: cache features in front of the adaLN gate (`"pre_gate"`, and apply the current gate) or behind it
            (`"post_gate"`); a pair for (shallow, deep). Default: hero `"post_gate"` (with `unsampled="reuse"`
            `("pre_gate", "post_gate")`), others `"pre_gate"`.
        unsampled: shallow tokens that are not sampled reuse their cached features (`"reuse"`, the paper), extrapolate them as
            deep layers do (`"extrapolate"`, Eq. 6), or follow the change of the adaLN gate to first order (`"gate"`). With
            the last two, caches behind the gate merge into two tensors per stream however many layers are refreshed.
            Default: hero `"extrapolate"`, which is nearer to full compute (measured in the docs); lean `"reuse"`.
        age_weighting: sample tokens with a probability that grows with the time they have not been sampled; false: uniformly.
        state_dtype: dtype to store features in: a floating-point one, or `torch.int8` with a float32 scale per token (of keys
            and values: per token and head); None keeps their own.
        form: `"collapsed"` (exact rewrites: one gather, one scatter, summed caches), or `"literal"`, one cache per branch.
        grid: (frames, height, width) of the image tokens, where the graph does not show it (packed latents). Without it,
            runs of tokens in a row are the patches there, and a warning is logged.
        timestep: the input with the diffusion time, by name or by position among the graph's inputs, where it is not found
            by itself.
        seed: seed of the sampling: the same seed gives the same video.
        inner: compiler of the rewritten graphs: `"inductor"`, `"aot_eager"`, `"eager"` (run as they are), or a callable.
        mode: Inductor's mode, as in `torch.compile(mode=...)`, which wins if both are given.
        options: Inductor's options, as in `torch.compile(options=...)`, which come on top.
        plan: a calibrated plan (`hero_fx.calibrate`), or the path of one. It decides policy, schedule, `num_steps` and the
            coefficients of cached steps; options given beside it must agree with it. Of a plan for several numbers of steps
            `num_steps` picks one; without it the timesteps of each trajectory do.
        plan_mismatch: where the model or a call is not what the plan was calibrated on: `"error"`, or `"warn"` and go on.
        max_state_bytes: bytes of feature state that all sessions may hold together. Where another one needs room, the state of
            those used least recently is freed: their next step is full, and `stats().evictions` counts them. None: no bound.
        disable_passes: names of passes to leave out, to find the one at fault: any that preserves numerics
            (`hero_fx.stages.OPTIONAL`).
        strict: true: a model that cannot be accelerated is an error; false: it is compiled plainly, with one warning.

    Raises:
        ValueError: an option is out of range or has no effect with the policy; the message names it, its value and the fix.
    """

    policy: str | Policy = field(default="hero", kw_only=False)
    interval: int = 2
    schedule: str | Sequence[object] = "uniform"
    num_steps: int | None = None
    warmup: int = 3
    cooldown: int = 1
    refresh_layers: int | float = 0.5
    refresh_ratio: float = 1 / 6
    patch: tuple[int, int, int] = (1, 2, 3)
    order: int = 1
    selection: Literal["per_step", "per_layer"] = "per_step"
    keys: Keys | None = None
    text: Text = "skip"
    cache_point: CachePoint | tuple[CachePoint, CachePoint] | None = None
    unsampled: Unsampled | None = None
    age_weighting: bool = True
    state_dtype: torch.dtype | None = None
    form: Literal["collapsed", "literal"] = "collapsed"
    grid: tuple[int, int, int] | None = None
    timestep: str | int | None = None
    seed: int = 0
    inner: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    options: Mapping[str, Any] | None = field(default=None, hash=False)
    plan: Plan | str | Path | None = None
    plan_mismatch: Literal["error", "warn"] = "error"
    max_state_bytes: int | None = None
    disable_passes: Sequence[str] = ()
    strict: bool = True

    def __post_init__(self) -> None:
        if self.plan is not None:
            self._follow(as_plan(self.plan))
        elif self.policy == "forecast":
            raise ValueError(
                "policy='forecast' needs a plan, for its coefficients are calibrated: plan=hero_fx.calibrate(...), or its path"
            )
        check_options(self)
        if self.plan is None:
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
        """Which steps of a trajectory of `num_steps` are full; None: as many as the options say.

        Raises:
            ValueError: the options are for another number of steps, or the plan for several.
        """
        if isinstance(self.plan, Plan):
            return self.plan.timeline(num_steps or self.num_steps)
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
                return Forecast(outputs=self.plan.outputs, parts=self.plan.parts)
            case "full":
                return None
        assert isinstance(self.policy, Policy)
        return self.policy

    @property
    def timelines(self) -> tuple[Timeline, ...]:
        """The parts of the plan that are for this number of steps, or for any where none is given; none without a plan."""
        if not isinstance(self.plan, Plan):
            return ()
        return tuple(t for t in self.plan.timelines if self.num_steps in (None, t.num_steps))

    def _follow(self, plan: Plan) -> None:
        """Takes over what the plan decides; what was given beside it must agree."""
        object.__setattr__(self, "plan", plan)
        plan.fitting(self.num_steps)
        decided = {"policy": plan.policy, **plan.options}
        if len(self.timelines) == 1:
            decided["schedule"] = self.timelines[0].schedule
        elif self.schedule != "uniform":
            raise ValueError(
                f"schedule={self.schedule!r}: the plan has a schedule for each of its {len(self.timelines)} timelines; leave "
                "it out beside plan="
            )
        if len({t.num_steps for t in self.timelines}) == 1:
            decided["num_steps"] = self.timelines[0].num_steps
        defaults = {f.name: f.default for f in fields(Config)}
        for name, value in decided.items():
            given = getattr(self, name)
            if name == "schedule" and not isinstance(given, str) and isinstance(given, Sequence):
                given = tuple(map(bool, given))
            if given not in (defaults[name], value):
                raise ValueError(f"{name}={given!r}: the plan was calibrated for {value!r}; leave it out beside plan=")
            object.__setattr__(self, name, value)
