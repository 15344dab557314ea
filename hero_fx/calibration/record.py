"""Recording: a few trajectories of full compute, kept as inner products.

While a trajectory runs, a sample of the positions of each output, latent and feature is held for every step. When it is over
all that stays are inner products per channel, so that memory does not grow with the number of trajectories times steps times
features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from hero_fx import dynamo
from hero_fx.backends import Backend
from hero_fx.build import find_structure, normalized
from hero_fx.checks import check_call, check_graph
from hero_fx.compiling import compile_step
from hero_fx.find_timestep import find_timestep
from hero_fx.fingerprint import fingerprint_of
from hero_fx.outputs import find_outputs
from hero_fx.passes.emit import value_of
from hero_fx.passes.normalize.subclasses import unwrap
from hero_fx.passes.rewrite.forecast import OutputRule, arguments_of, outputs_of
from hero_fx.passes.slots import FeatureSlot, StateSlot
from hero_fx.plan import Fingerprint
from hero_fx.ranks import check_alone
from hero_fx.runtime.evidence import Evidence
from hero_fx.runtime.timestep import TimestepReader
from hero_fx.runtime.tracker import Tracker
from hero_fx.schedule import Uniform
from hero_fx.step_graphs import copy_graph

__all__ = ["Recorder", "Recording", "frames_axis"]


@dataclass(slots=True)
class Recording:
    """What one trajectory left."""

    timesteps: tuple[float, ...]
    outputs: dict[str, Tensor]
    """By output table: [lanes, groups, frames, channels, M, M], M = T outputs, then T latents if there is one."""
    features: dict[str, Tensor]
    """By `policy/features`: [lanes, channels, T, T]."""
    gains: Tensor
    """[T, lanes, groups]: how far an error of the first output moves the next latent; ones without a latent."""


@dataclass(slots=True)
class _Lane:
    """The samples of the calls of one lane, by name, one per step."""

    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        self.kept.setdefault(name, []).append(value)


def frames_axis(rule: OutputRule, rank: int) -> int | None:
    """The axis of frames of a video [B, C, F, H, W] or [B, F, C, H, W]; None for anything else."""
    return 3 - rule.axis if rank == 5 and rule.axis in (1, 2) else None


class Recorder:
    """A torch.compile backend that leaves the model as it is and records what plans are fitted to."""

    __name__ = "hero_fx_calibration"

    def __init__(
        self,
        tapped: Mapping[str, Backend],
        options: Backend,
        *,
        latent: Any,
        samples: int,
        feature_samples: int,
        seed: int,
    ) -> None:
        """`tapped`: by policy, the backend whose full steps record its features. `options`: how graphs are compiled."""
        self.tapped, self.options, self.latent = tapped, options, latent
        self.samples, self.feature_samples, self.seed = samples, feature_samples, seed
        self.rules: tuple[OutputRule, ...] = ()
        self._compiled = False
        self.fingerprint = Fingerprint()
        self.batch = 1
        self.unsupported: dict[str, str] = {}
        self.varying: dict[str, Tensor] = {}
        self._times: list[float] = []
        self._lanes: dict[int | str, _Lane] = {}
        self._first: dict[str, Tensor] = {}
        self._done: list[Recording] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Takes the model's graph."""
        if self._compiled:
            guard = dynamo.recompile_reason()
            raise ValueError(
                "the model was compiled a second time while it was recorded: all calls of all trajectories must have the "
                f"same shapes and strides{f' (the guard that failed: {guard})' if guard else ''}"
            )
        self._compiled = True
        plain = unwrap(gm, inputs)
        gm, inputs = plain.gm, plain.inputs
        check_call(gm, inputs)
        dynamo.specialize(gm)
        check_graph(gm)
        normal, _ = normalized(gm, inputs)
        check_alone(
            normal,
            "calibrate the model in one process, before enable_parallelism, and give all of them the plan's file",
        )
        structure, config = find_structure(normal), self.options.config
        position = find_timestep(normal, config.timestep)
        self.rules = find_outputs(normal, position, self.latent)
        self.module = dynamo.frame_module()
        self.normal, self.structure = normal, structure
        run = compile_step(gm, copy_graph(normal), config).run
        taps = [
            tap
            for policy, backend in self.tapped.items()
            if (tap := self._tap(policy, backend, gm, inputs)) is not None
        ]
        inputs_of = normal.graph.find_nodes(op="placeholder")
        places = {name: inputs_of.index(node) for name, node in arguments_of(normal).items()}
        first = next(value for value in outputs_of(normal) if isinstance(value, fx.Node))
        self.batch = int(value_of(first).shape[0])
        tracker, reader = Tracker(Uniform(interval=1)), TimestepReader()

        def call(*values: Any) -> Any:
            times = reader.read(values[position])
            at = tracker.advance(Evidence(timestep=times))
            if at.new_trajectory and self._lanes:
                self._close()
            outputs = run(*values)
            lane = self._lanes.setdefault(at.lane, _Lane())
            if at.step == len(self._times):
                self._times.append(max(times.values))
            for rule in self.rules:
                latent = values[places[rule.latent]] if rule.latent is not None else None
                self._keep(lane, rule, outputs[rule.index].detach(), latent)
            for tap in taps:
                for name, state in tap(values).items():
                    lane.add(name, state)
            return outputs

        return plain.call(call)

    def _tap(
        self, policy: str, backend: Backend, gm: fx.GraphModule, inputs: Sequence[Any]
    ) -> Callable[[Sequence[Any]], dict[str, Tensor]] | None:
        """Runs a full step of a policy and samples the features that it records."""
        try:
            steps = backend.trace(gm, inputs)
        except ValueError as error:
            self.unsupported[policy] = str(error)
            return None
        step = compile_step(gm, steps.full, self.options.config)
        terms = {spec.slot: spec for spec in steps.state if isinstance(spec.slot, FeatureSlot)}
        read = {slot.features: s for slot, s in terms.items() if slot.term == 0 and replace(slot, term=1) in terms}
        with torch.inference_mode(False):
            state = {s.slot: torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in steps.state}
            one = torch.ones((), device=step.device)

        def tap(values: Sequence[Any]) -> dict[str, Tensor]:
            step.run(*values, *[state[slot] if isinstance(slot, StateSlot) else one for slot in step.slots])
            return {
                f"{policy}/{name}": self._rows(state[s.slot].flatten(0, -2), self.feature_samples).clone()
                for name, s in read.items()
            }

        return tap

    def _keep(self, lane: _Lane, rule: OutputRule, output: Tensor, latent: Tensor | None) -> None:
        lane.add(rule.table, self._cells(rule, output))
        if latent is None:
            return
        assert rule.axis is not None
        if latent.shape != output.shape:
            extra = latent.movedim(rule.axis, 0).flatten(1)
            known = self._first.setdefault(rule.table, extra.clone())
            changed = (extra != known).any(dim=1)
            self.varying[rule.table] = self.varying.get(rule.table, torch.zeros_like(changed)) | changed
        lane.add(f"{rule.table}_x", self._cells(rule, latent))

    def _cells(self, rule: OutputRule, value: Tensor) -> Tensor:
        """Sampled positions by row of the batch and frame: [groups, frames, positions, channels], float32."""
        if rule.axis is None:
            value = value.reshape(value.shape[0] if value.dim() else 1, 1, -1, 1)
        else:
            frames = frames_axis(rule, value.dim())
            value = value.movedim(rule.axis, -1)
            # Channels have left their place: an axis behind them has moved up by one.
            if frames is not None:
                value = value.movedim(frames - (frames > rule.axis), 1).flatten(2, -2)
            else:
                value = value.reshape(len(value), 1, -1, value.shape[-1])
        return self._rows(value.movedim(2, 0), self.samples).movedim(0, 2).float()

    def _rows(self, value: Tensor, most: int) -> Tensor:
        """A seeded sample of the first axis, the same at every step."""
        if len(value) <= most:
            return value.float()
        order = torch.randperm(len(value), generator=torch.Generator().manual_seed(self.seed))
        return value[order[:most].sort().values.to(value.device)].float()

    def finish(self) -> list[Recording]:
        """The trajectories that ran since the last call, in order: of an autoregressive model, one for each chunk.

        Raises:
            ValueError: nothing ran, or lanes were called at different steps.
        """
        if not self._lanes:
            raise ValueError("run(model, i) did not call the model that it was given: use it in place of the model")
        self._close()
        done, self._done = self._done, []
        self.fingerprint = fingerprint_of(self.normal, self.structure, self.module, self.rules)
        return done

    def _close(self) -> None:
        """Turns the trajectory that has just run into inner products."""
        counts = {len(values) for lane in self._lanes.values() for values in lane.kept.values()}
        if counts != {len(self._times)}:
            raise ValueError(
                f"the calls of a step differ from step to step ({sorted(counts)} calls in {len(self._times)} steps): a plan "
                "needs the same calls at every step"
            )
        self._settle_latents()
        outputs = {rule.table: self._output_gram(rule) for rule in self.rules}
        lanes = list(self._lanes.values())
        features = {}
        for name in [name for name in lanes[0].kept if "/" in name]:
            features[name] = torch.stack([_gram(torch.stack(lane.kept[name]).movedim(2, 0)) for lane in lanes]).cpu()
        self._done.append(Recording(tuple(self._times), outputs, features, self._gains()))
        self._lanes.clear()
        self._times.clear()
        self._first.clear()  # conditions differ from trajectory to trajectory, and only from step to step they stay

    def _settle_latents(self) -> None:
        """Which channels of an argument are the latent: those that change from step to step."""
        settled = []
        for rule in self.rules:
            varying = self.varying.get(rule.table)
            if rule.latent is not None and varying is not None:
                where = varying.nonzero().flatten().tolist()
                channels = next(iter(self._lanes.values())).kept[rule.table][0].shape[-1]
                whole = bool(where) and where == list(range(where[0], where[0] + channels))
                rule = replace(rule, start=where[0]) if whole else replace(rule, latent=None)
            settled.append(rule)
        self.rules = tuple(settled)

    def _latents(self, lane: _Lane, rule: OutputRule) -> Tensor | None:
        if rule.latent is None:
            return None
        channels = lane.kept[rule.table][0].shape[-1]
        return torch.stack(lane.kept[f"{rule.table}_x"])[..., rule.start : rule.start + channels]

    def _output_gram(self, rule: OutputRule) -> Tensor:
        grams = []
        for lane in self._lanes.values():
            values = torch.stack(lane.kept[rule.table])
            latents = self._latents(lane, rule)
            both = values if latents is None else torch.cat([values, latents])
            grams.append(_gram(both.permute(1, 2, 4, 0, 3)))  # [groups, frames, channels, M, positions]
        return torch.stack(grams).cpu()

    def _gains(self) -> Tensor:
        """Least squares of the next latent on this one and the outputs of all calls: |weight of each output|."""
        rule, lanes = self.rules[0], list(self._lanes.values())
        steps, groups = len(self._times), lanes[0].kept[self.rules[0].table][0].shape[0]
        gains = torch.ones(steps, len(lanes), groups)
        latents = self._latents(lanes[0], rule)
        if latents is None or steps < 2:
            return gains
        for step in range(steps - 1):
            columns = [latents[step, 0].flatten()]
            columns += [lane.kept[rule.table][step][g].flatten() for lane in lanes for g in range(groups)]
            table = torch.stack(columns, dim=1).double().cpu()
            target = latents[step + 1, 0].flatten().double().cpu()
            normal = table.T @ table
            weights = torch.linalg.solve(
                normal + 1e-9 * normal.diagonal().mean() * torch.eye(len(normal)), table.T @ target
            )
            gains[step] = weights[1:].abs().reshape(len(lanes), groups).float()
        gains[-1] = gains[-2]
        return gains


def _gram(values: Tensor) -> Tensor:
    """Inner products [..., M, M] of values [..., M, positions], per position."""
    return (values @ values.transpose(-2, -1)) / values.shape[-1]
