"""Recording: a few trajectories of full compute, kept as inner products.

While a trajectory runs, a sample of the positions of each output, latent and feature is held for every step. When it is over
inner products per channel stay, so that memory does not grow with the number of trajectories times steps times features, and
the few positions of outputs and latents that a closed loop is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from hero_fx import dynamo
from hero_fx.backends import Backend
from hero_fx.build import find_structure, normalized
from hero_fx.checks import check_call, check_graph
from hero_fx.compiling import compile_step
from hero_fx.fingerprint import fingerprint_of
from hero_fx.outputs import find_outputs
from hero_fx.passes.emit import value_of
from hero_fx.passes.normalize.subclasses import unwrap
from hero_fx.passes.rewrite.forecast import OutputRule, outputs_of
from hero_fx.passes.slots import FeatureSlot, StateSlot
from hero_fx.plan import Fingerprint
from hero_fx.ranks import check_alone
from hero_fx.step_graphs import copy_graph

from .samples import NEAR, Arguments, Calls, Lane, Track, Watch, rows, settled
from .solve import gram

__all__ = ["Recorder", "Recording"]


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
    near: Track
    """Its outputs and latents at a few positions."""


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
        self.feature_samples, self.seed = feature_samples, seed
        self.samples = samples
        self._all, self._near = Watch(samples, seed), self.nearby()
        self.rules: tuple[OutputRule, ...] = ()
        self._compiled = False
        self.fingerprint = Fingerprint()
        self.batch = 1
        self.unsupported: dict[str, str] = {}
        self.varying: dict[str, Tensor] = {}
        self._calls = Calls()
        self._features: dict[int | str, Lane] = {}
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
        arguments = Arguments.of(normal, config.timestep)
        self.rules = find_outputs(normal, arguments.timestep, self.latent)
        self.module = dynamo.frame_module()
        self.normal, self.structure = normal, structure
        run = compile_step(gm, copy_graph(normal), config).run
        taps = [
            tap
            for policy, backend in self.tapped.items()
            if (tap := self._tap(policy, backend, gm, inputs)) is not None
        ]
        first = next(value for value in outputs_of(normal) if isinstance(value, fx.Node))
        self.batch = int(value_of(first).shape[0])

        def call(*values: Any) -> Any:
            before = tuple(self._calls.times)
            lane, begins = self._calls.of(values[arguments.timestep])
            if begins:
                self._close(before)
            outputs = run(*values)
            latents = arguments.latents(self.rules, values)
            self._vary(latents, outputs)
            for watch in (self._all, self._near):
                watch.add(lane, self.rules, outputs, latents)
            for tap in taps:
                for name, state in tap(values).items():
                    self._features.setdefault(lane, Lane()).add(name, state)
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
                f"{policy}/{name}": rows(state[s.slot].flatten(0, -2), self.feature_samples, self.seed)
                for name, s in read.items()
            }

        return tap

    def nearby(self) -> Watch:
        """Keeps what is kept of every trajectory: a few positions."""
        return Watch(min(self.samples, NEAR), self.seed)

    def _vary(self, latents: Mapping[str, Tensor], outputs: Sequence[Any]) -> None:
        """Notes which channels of arguments change from step to step, where not all of them can be the latent."""
        for rule in self.rules:
            latent = latents.get(rule.table)
            if latent is None or latent.shape == outputs[rule.index].shape:
                continue
            assert rule.axis is not None
            extra = latent.movedim(rule.axis, 0).flatten(1)
            known = self._first.setdefault(rule.table, extra.clone())
            changed = (extra != known).any(dim=1)
            self.varying[rule.table] = self.varying.get(rule.table, torch.zeros_like(changed)) | changed

    def finish(self) -> list[Recording]:
        """The trajectories that ran since the last call, in order: of an autoregressive model, one for each chunk.

        Raises:
            ValueError: nothing ran, or lanes were called at different steps.
        """
        if not self._all.lanes:
            raise ValueError("run(model, i) did not call the model that it was given: use it in place of the model")
        self._close(tuple(self._calls.times))
        self._calls.end()
        done, self._done = self._done, []
        self.fingerprint = fingerprint_of(self.normal, self.structure, self.module, self.rules)
        return done

    def _close(self, times: tuple[float, ...]) -> None:
        """Turns the trajectory that has just run into inner products."""
        self.rules = tuple(
            rule
            if rule.latent is None or rule.table not in self.varying
            else settled(rule, self.varying[rule.table], self._all.channels(rule))
            for rule in self.rules
        )
        track, near = (watch.take(self.rules, len(times)) for watch in (self._all, self._near))
        outputs = {rule.table: _output_gram(track, rule) for rule in self.rules}
        lanes, features = list(self._features.values()), {}
        for name in lanes[0].kept if lanes else ():
            features[name] = torch.stack([gram(torch.stack(lane.kept[name]).movedim(2, 0)) for lane in lanes]).cpu()
        self._done.append(Recording(times, outputs, features, _gains(track, self.rules[0]), near.cpu()))
        self._features.clear()
        self._first.clear()  # conditions differ from trajectory to trajectory, and only from step to step they stay


def _output_gram(track: Track, rule: OutputRule) -> Tensor:
    """[lanes, groups, frames, channels, M, M]."""
    values = track.outputs[rule.table]
    both = torch.cat([values, track.latents[rule.table]]) if rule.table in track.latents else values
    return torch.stack([gram(lane.permute(1, 2, 4, 0, 3)) for lane in both.unbind(1)]).cpu()


def _gains(track: Track, rule: OutputRule) -> Tensor:
    """Least squares of the next latent on this one and the outputs of all calls: |weight of each output|."""
    outputs = track.outputs[rule.table]
    steps, lanes, groups = outputs.shape[:3]
    gains = torch.ones(steps, lanes, groups)
    if rule.table not in track.latents or steps < 2:
        return gains
    latents = track.latents[rule.table][:, 0, 0].flatten(1)
    for step in range(steps - 1):
        table = torch.stack([latents[step], *outputs[step].flatten(0, 1).flatten(1)], dim=1).double().cpu()
        target = latents[step + 1].double().cpu()
        normal = table.T @ table
        weights = torch.linalg.solve(
            normal + 1e-9 * normal.diagonal().mean() * torch.eye(len(normal)), table.T @ target
        )
        gains[step] = weights[1:].abs().reshape(lanes, groups).float()
    gains[-1] = gains[-2]
    return gains
