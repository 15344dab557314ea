"""Calibrated plans: which steps are full and what cached steps are multiplied with, learned from a model before the run.

`hero_fx.calibrate` makes a plan and `hero_fx.backend(plan=...)` follows it. A plan is plain data. In a file it is a
safetensors archive: the coefficients are its tensors, everything else is JSON in its metadata, and nothing is executed when
it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hero_fx.passes.rewrite.forecast import OutputRule

from .timeline import Timeline, table_of

__all__ = ["POLICIES", "Fingerprint", "Plan", "Timeline", "as_plan"]

POLICIES = ("forecast", "hero", "taylorseer", "lean")
"""Policies that a plan can have coefficients for."""
_FORMAT, _VERSION = "hero_fx.plan", 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What a model is, as far as a plan depends on it; weights are not in it, so a fine-tuned model may use its plan."""

    name: str = ""
    """Class of the module."""
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Its configuration, where it has one (diffusers' models do): values that JSON holds."""
    depth: int = 0
    """Layers that were found."""
    width: int = 0
    """Of the first residual stream."""
    outputs: tuple[tuple[int, ...], ...] = ()
    """Channels that each forecast output and its frames have: sizes of the axes that coefficients are given for."""

    def differences(self, other: Fingerprint, where: str = "the plan") -> list[str]:
        """What differs in another model, one phrase each: `num_layers is 16 here and 12 in the plan`."""
        mine, theirs = self._flat(), other._flat()
        return [
            f"{name} is {theirs.get(name)!r} here and {mine.get(name)!r} in {where}"
            for name in dict.fromkeys((*mine, *theirs))
            if mine.get(name) != theirs.get(name)
        ]

    def _flat(self) -> dict[str, Any]:
        flat = {name: value for name, value in asdict(self).items() if name != "config"}
        flat["class"] = flat.pop("name")
        flat["outputs"] = tuple(map(tuple, self.outputs))
        return flat | {f"config.{name}": value for name, value in self.config.items()}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """What `hero_fx.calibrate` learned; `hero_fx.backend(plan=...)` follows it. Print it to read it."""

    policy: str
    """`"forecast"`, `"hero"`, `"taylorseer"` or `"lean"`."""
    timelines: tuple[Timeline, ...]
    """One or more, for different timesteps or phases."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `hero_fx.backend` that its coefficients were fitted for."""
    outputs: tuple[OutputRule, ...] = ()
    """How each output is forecast (policy `"forecast"`)."""
    model: Fingerprint | None = None
    """What it was calibrated on; None for a plan made by hand, which is not checked against the model."""
    lanes: int = 1
    """Calls of the model per step: 2 for separate conditional and unconditional calls."""
    batch: int = 1
    """Rows of the batch per sample: 2 where guidance doubles it. The batch of a call must be a multiple of it."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What it was calibrated on, for people."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r} of a plan is not one of {', '.join(map(repr, POLICIES))}")
        if not self.timelines:
            raise ValueError("timelines=() is empty: a plan needs one for each number of steps it is for")
        if (self.policy == "forecast") != bool(self.outputs):
            raise ValueError(
                f"outputs={self.outputs!r}: policy 'forecast' needs rules for outputs, and only it has them"
            )
        if len({(t.timesteps, t.phase) for t in self.timelines}) < len(self.timelines):
            raise ValueError("two timelines have the same timesteps: which one is meant could not be told")
        for phases in self._groups():
            if sorted(phases) != list(range(len(phases))):
                raise ValueError(
                    f"timelines with the same timesteps have the phases {sorted(phases)}: number them from 0"
                )
        first = self.timelines[0]
        if self.parts > 1 and (self.policy != "forecast" or self.lanes > 1 or self.batch % self.parts):
            raise ValueError(
                f"timelines have {self.parts} parts of the batch: that is for policy 'forecast', one call a step, and a batch "
                f"that they divide (policy={self.policy!r}, lanes={self.lanes}, batch={self.batch})"
            )
        for timeline in self.timelines:
            if max(1, len(timeline.parts)) != self.parts:
                raise ValueError("timelines differ in their number of parts of the batch: one step graph is for all")
            for rule in self.outputs:
                if rule.table not in timeline.coefficients:
                    raise ValueError(f"coefficients of the timeline of {timeline.num_steps} steps lack {rule.table!r}")
            if timeline.shapes != first.shapes:
                raise ValueError(
                    f"coefficients of the timeline of {timeline.num_steps} steps have the shapes {timeline.shapes}, and those "
                    f"of {first.num_steps} steps {first.shapes}: one step graph reads both, so they must agree"
                )

    def _groups(self) -> list[dict[int, Timeline]]:
        """Timelines by phase, those of the same timesteps together."""
        found: dict[tuple[float, ...], dict[int, Timeline]] = {}
        for timeline in self.timelines:
            found.setdefault(timeline.timesteps, {})[timeline.phase] = timeline
        return list(found.values())

    @property
    def parts(self) -> int:
        """Parts of the batch with full steps and state of their own; 1 where it is one."""
        return max(1, len(self.timelines[0].parts))

    @property
    def phases(self) -> int:
        """Trajectories of a session that have coefficients of their own; the last ones are for all that follow."""
        return max(map(len, self._groups()))

    def fitting(self, num_steps: int | None = None, phase: int = 0) -> tuple[Timeline, ...]:
        """The timelines for a number of steps, or for any, and for the trajectory of a session that has this number.

        Raises:
            ValueError: there is none.
        """
        found = [phases[min(phase, len(phases) - 1)] for phases in self._groups()]
        fitting = tuple(t for t in found if num_steps in (None, t.num_steps))
        if not fitting:
            known = ", ".join(str(t.num_steps) for t in found)
            raise ValueError(
                f"num_steps={num_steps}: the plan is for {known} steps; run as many, or calibrate for {num_steps} steps"
            )
        return fitting

    def timeline(self, num_steps: int | None = None, phase: int = 0) -> Timeline:
        """The timeline of a number of steps; the only one for None.

        Raises:
            ValueError: there is none, or more than one.
        """
        found = self.fitting(num_steps, phase)
        if len(found) > 1:
            known = ", ".join(str(t.num_steps) for t in found)
            raise ValueError(
                f"num_steps={num_steps}: the plan has timelines of {known} steps; say which with num_steps="
            )
        return found[0]

    def with_timelines(self, other: Plan) -> Plan:
        """This plan with the timelines of another too, which is for the same model and policy: one file for several numbers
        of steps.

        Raises:
            ValueError: they are not for the same model, policy, options and guidance, or both have the same timesteps.
        """
        differ = [
            n
            for n in ("policy", "options", "outputs", "model", "lanes", "batch")
            if getattr(self, n) != getattr(other, n)
        ]
        if differ:
            raise ValueError(f"the plans differ in {', '.join(differ)}, so they stay two plans")
        return Plan(
            policy=self.policy, timelines=(*self.timelines, *other.timelines), options=self.options, outputs=self.outputs,
            model=self.model, lanes=self.lanes, batch=self.batch, notes={**other.notes, **self.notes},
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        from safetensors.torch import save_file

        tensors, timelines = {}, []
        for number, timeline in enumerate(self.timelines):
            for name, table in timeline.coefficients.items():
                tensors[f"{number}/{name}"] = table.detach().to("cpu", torch.float32).contiguous().clone()
            kept = {
                name: getattr(timeline, name) for name in ("schedule", "timesteps", "error", "speed", "parts", "phase")
            }
            timelines.append({**kept, "error": dict(timeline.error)})
        known = {
            "policy": self.policy, "options": dict(self.options), "outputs": [asdict(rule) for rule in self.outputs],
            "model": None if self.model is None else asdict(self.model), "lanes": self.lanes,
            "batch": self.batch, "notes": dict(self.notes),
            "timelines": timelines,
        }  # fmt: skip
        metadata = {"format": _FORMAT, "version": str(_VERSION), "plan": json.dumps(known)}
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a file that `save` wrote; nothing in it is executed.

        Raises:
            ValueError: it is no such file, or of a later version.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ValueError(f"plan={str(path)!r}: there is no such file; hero_fx.calibrate(...).save(path) writes one")
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"plan={str(path)!r} is no safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"plan={str(path)!r} holds no plan; hero_fx.calibrate(...).save(path) writes one")
        if metadata.get("version") != str(_VERSION):
            raise ValueError(
                f"plan={str(path)!r} has version {metadata.get('version')} of the format, and this hero_fx reads version "
                f"{_VERSION}: calibrate anew, or use the hero_fx that wrote it"
            )
        try:
            return cls._from(json.loads(metadata["plan"]), tensors)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"plan={str(path)!r} is damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def _from(cls, known: dict[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
        timelines = []
        for number, kept in enumerate(known.pop("timelines")):
            prefix = f"{number}/"
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            schedule, timesteps = tuple(map(bool, kept.pop("schedule"))), tuple(map(float, kept.pop("timesteps")))
            kept["parts"] = tuple(tuple(map(bool, part)) for part in kept.get("parts", ()))
            timelines.append(Timeline(schedule=schedule, timesteps=timesteps, coefficients=own, **kept))
        model = known.pop("model")
        if model is not None:
            model = Fingerprint(**model | {"outputs": tuple(map(tuple, model["outputs"]))})
        outputs = tuple(OutputRule(**rule) for rule in known.pop("outputs"))
        options = {n: tuple(v) if isinstance(v, list) else v for n, v in known.pop("options").items()}
        return cls(
            timelines=tuple(timelines), model=model, outputs=outputs, options=options, **known
        )  # fmt: skip

    def __str__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        calls = "one call" if self.lanes == 1 else f"{self.lanes} calls"
        rows = [f"batch {self.batch} per sample" if self.batch > 1 else "one row of the batch per sample"]
        lines = [
            f"plan: policy {self.policy!r}{options}",
            f"for {_named(self.model)}; {calls} a step, {rows[0]}",
            *(f"output {rule.index}: {_describe(rule)}" for rule in self.outputs),
            *(f"{name}: {note}" for name, note in self.notes.items()),
            table_of(self.timelines),
        ]
        return "\n".join(lines)


def _named(model: Fingerprint | None) -> str:
    if model is None:
        return "any model"
    return f"{model.name or 'a model without a name'}, {model.depth} layers of width {model.width}"


def _describe(rule: OutputRule) -> str:
    past = f"from the last {rule.history} outputs" if rule.history > 1 else "from the last output"
    latent = f" and the latent in {rule.latent}, from channel {rule.start}" if rule.latent else ", without a latent"
    apart = [name for name, has in (("channel", rule.axis is not None), ("frame", rule.frames is not None)) if has]
    apart += ["part of the batch"] * (rule.groups > 1)
    return f"{past}{latent}; coefficients by {', '.join(apart) or 'step alone'}"


def as_plan(plan: Plan | str | Path) -> Plan:
    """A plan, or the plan in a file.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, (str, Path)):
        return Plan.load(plan)
    raise ValueError(f"plan={plan!r} is neither a hero_fx.Plan nor the path of one")
