"""The torch.compile backend: `torch.compile(model, backend=hero_fx.backend(...))`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ParamSpec

import torch
from torch import fx

from hero_fx.passes import compat
from hero_fx.passes.normalize.subclasses import Unwrapped
from hero_fx.runtime.batch import Batch, current_batch
from hero_fx.runtime.batched import BatchStepper
from hero_fx.runtime.diffusers_context import entered, listen
from hero_fx.runtime.inputs import graph_inputs
from hero_fx.runtime.planned import planned_for
from hero_fx.runtime.stepper import CompiledStep, Stepper
from hero_fx.warm.called import called

from . import dynamo
from .build import build_steps
from .checks import UnsupportedModel, as_ours, check_call, check_graph, check_structure
from .compiling import compile_batched, compile_plain, compile_step
from .config import Config
from .find_timestep import find_timestep
from .fingerprint import check_fingerprint
from .flops import too_much_outside
from .plan import Plan
from .policy import Forecast, Policy
from .program import read
from .ranks import check_options, check_refreshed
from .source import Source
from .stack import warn
from .stats import Stats
from .step_graphs import StepGraphs
from .steppers import Steppers

__all__ = ["Backend", "Stats", "backend", "hero_fx"]

log = logging.getLogger(__name__)

_Options = ParamSpec("_Options")


class Backend:
    """A torch.compile backend with the options of `hero_fx.backend`; one object may compile several models."""

    __name__ = "hero_fx"

    def __init__(self, config: Config) -> None:
        self.config = config
        self._steppers = Steppers(config.max_state_bytes)
        self._warned = False
        listen()

    def __repr__(self) -> str:
        return f"hero_fx.backend({self.config!r})"

    def __call__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dynamo.Compiled:
        """Compiles one Dynamo graph; `mode` and `options` are torch.compile's and go to Inductor."""
        config = self.config
        if mode or options:
            config = replace(
                config, mode=mode or config.mode, options={**(config.options or {}), **(options or {})} or None
            )
        return self.compile(Source(gm, inputs), config)

    def compile(self, source: Source, config: Config) -> dynamo.Compiled:
        """Compiles what Dynamo traced, for this backend alone or for others too."""
        policy = config.make_policy()
        if policy is None:
            return compile_plain(source.gm, source.inputs, config)
        batch = current_batch()
        try:
            plain = source.plain
            if batch is not None and len(batch.calls) > 1:
                return plain.call(self._batched(plain, config, batch))
            steps, timestep = self._steps(source, config, policy)
            stepper = self._compile(plain.gm, plain.inputs, config, policy, steps, timestep)
        except Exception as error:
            if dynamo.is_control_flow(error):
                raise
            if config.strict:
                raise as_ours(error) from error
            self._warn_of_plain(as_ours(error))
            return compile_plain(source.gm, source.inputs, config)
        for fallback in steps.fallbacks:
            warn(
                f"hero_fx: {fallback.branch} cannot be cached as planned and is computed in full at every step: "
                f"{fallback.reason}"
            )
        much = too_much_outside(steps.normal, steps.structure)
        if much is not None:  # to the log: it is no fault of a call, and small models are like that
            log.warning("%s", much)
        return plain.call(stepper)

    def _warn_of_plain(self, error: Exception) -> None:
        message = f"hero_fx compiles this model without step caching: {error}"
        # A model with graph breaks comes in pieces: one warning, the further pieces go to the log.
        if self._warned:
            log.warning("%s", message)
        else:
            self._warned = True
            warn(message)

    def trace(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> StepGraphs:
        """The step graphs of a Dynamo graph, without compiling them. Raises what compiling would raise."""
        return self.steps_of(Source(gm, inputs))

    def steps_of(self, source: Source) -> StepGraphs:
        """The same of what Dynamo traced for other backends too."""
        policy = self.config.make_policy()
        if policy is None:
            raise ValueError("policy='full' rewrites nothing: there are no step graphs to look at")
        return self._steps(source, self.config, policy)[0]

    def rewrite(self, steps: StepGraphs) -> StepGraphs:
        """The step graphs that this backend's options give for a model that another backend traced."""
        policy = self.config.make_policy()
        if policy is None:
            raise ValueError("policy='full' rewrites nothing: there are no step graphs to look at")
        return build_steps(steps.normal, steps.structure, policy, self.config)

    def follow(self, plan: Plan) -> None:
        """Goes on by another plan for the same policy, options and outputs; nothing is compiled anew.

        Raises:
            ValueError: this backend has no plan, or one that step graphs depend on in another way.
        """
        old = self.config.plan
        if not isinstance(old, Plan):
            raise ValueError("this backend follows no plan: give it one with plan= when it is made")
        ours, theirs = ((p.policy, dict(p.options), p.outputs, p.timelines[0].shapes) for p in (old, plan))
        if ours != theirs:
            raise ValueError(
                "the plan differs in policy, options, outputs or the shapes of coefficients: make a new backend"
            )
        self.config = replace(self.config, plan=plan, schedule="uniform", num_steps=None)
        for stepper in self.steppers:
            stepper.follow(self.config.schedule_of, planned_for(self.config))

    @property
    def steppers(self) -> list[Stepper]:
        """What was compiled and is still in use, oldest first: code that Dynamo dropped is gone, and its state with it."""
        return self._steppers.alive

    @property
    def graphs(self) -> list[StepGraphs]:
        """The step graphs of what was compiled and is still in use, oldest first."""
        return [stepper.graphs for stepper in self.steppers if stepper.graphs is not None]

    def stats(self) -> Stats:
        """Counts of steps and calls over all that this backend ever compiled; graphs and state are what there is now."""
        return self._steppers.stats()

    def reset(self) -> None:
        """Forgets the trajectories of everything this backend compiled and frees their state; compiled code stays."""
        for stepper in self.steppers:
            stepper.store.drop()

    def load(self, full: CompiledStep, cached: Sequence[CompiledStep], **parts: Any) -> Stepper:
        """A stepper over steps that were compiled before, as `hero_fx.load` reads them; `parts` are arguments of `Stepper`."""
        policy = self.config.make_policy()
        assert policy is not None
        return self._steppers.make(self.config, policy, full, cached, **parts)

    def _steps(self, source: Source, config: Config, policy: Policy) -> tuple[StepGraphs, int]:
        plain = source.plain
        check_call(plain.gm, plain.inputs)
        if dynamo.specialize(plain.gm):
            log.info("sizes are baked into step graphs: every resolution compiles once and owns its state")
        check_graph(plain.gm)
        normal, records, structure = source.normal(config.disable_passes)
        try:
            check_structure(normal, structure, forecast=isinstance(policy, Forecast))
        except UnsupportedModel as error:
            if not plain.kinds:
                raise
            raise UnsupportedModel(
                f"{error}. Its weights are {', '.join(plain.kinds)}: layers with quantised weights are followed, those that "
                "quantise activations too are not"
            ) from None
        timestep = find_timestep(normal, config.timestep)
        if config.plan is not None:
            check_fingerprint(config, normal, structure)
        check_options(normal, structure, policy, config)
        steps = build_steps(normal, structure, policy, config, records)
        check_refreshed(steps)
        return steps, timestep

    def _compile(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        config: Config,
        policy: Policy,
        steps: StepGraphs,
        timestep: int,
    ) -> Stepper:
        stepper = self._steppers.make(
            config,
            policy,
            compile_step(gm, steps.full, config),
            [compile_step(gm, cached, config) for cached in steps.cached],
            state=steps.state,
            sampler=steps.sampler,
            inputs=graph_inputs(steps, timestep),
            graphs=steps,
            context=entered(dynamo.frame_module()),
            again=dynamo.recompile_reason(),
            called=called(),
            program=read(gm),
        )
        self._warn_of_limit(len(self.steppers))
        return stepper

    def _batched(self, plain: Unwrapped, config: Config, batch: Batch) -> BatchStepper:
        """What runs a Dynamo graph of several requests: the step graphs of one, once they are needed."""
        check_call(plain.gm, plain.inputs)
        check_graph(plain.gm)
        stepper = BatchStepper(read(plain.gm), lambda: self.steppers, partial(compile_batched, config))
        tensors = [value for value in plain.inputs if isinstance(value, torch.Tensor)]
        stepper.find([tuple(map(compat.size_now, tensor.shape)) for tensor in tensors], batch.calls)
        return stepper

    def _warn_of_limit(self, graphs: int) -> None:
        """Says ahead that Dynamo will not compile another shape of this model: what it says then names no fix."""
        limit = dynamo.last_recompile()
        if limit is not None and graphs >= limit:
            warn(
                f"hero_fx: every resolution and text length compiles once, this is number {graphs}, and "
                f"torch._dynamo.config.recompile_limit={limit} allows no further one: the model would run uncompiled, or "
                "raise with fullgraph=True. Raise torch._dynamo.config.recompile_limit if calls have more shapes"
            )


def _with_options_of(
    config: Callable[_Options, Config],
) -> Callable[[Callable[..., Backend]], Callable[_Options, Backend]]:
    """Gives a function the signature of the options, and their documentation: both are written once."""

    def decorate(function: Callable[..., Backend]) -> Callable[_Options, Backend]:
        documentation = str(config.__doc__)
        function.__doc__ = f"{function.__doc__}\n    {documentation[documentation.index('Args:') :]}"
        function.__signature__ = inspect.signature(config).replace(return_annotation=Backend)  # type: ignore[attr-defined]
        return function

    return decorate


@_with_options_of(Config)
def backend(*policy: Any, **options: Any) -> Backend:
    """A torch.compile backend that caches features between denoising steps.

    ::

        model = torch.compile(model, backend=hero_fx.backend(interval=2, num_steps=50))

    Between full steps, layers 0..M-1 recompute a sampled share of the image tokens and take cached features for the
    rest (paper Eq. 4-5; by default these are extrapolated linearly, see `unsampled`); the other layers extrapolate their
    features and run neither attention nor FFN (Eq. 6). Which step a call belongs to is read from the model's timestep
    input, so the denoising loop stays as it is.

    Returns:
        A callable backend; `.stats()` counts steps and bytes, `hero_fx.explain(...)` tells what it did.
    """
    return Backend(Config(*policy, **options))


def hero_fx(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dynamo.Compiled:
    """The backend by name, without an import: `torch.compile(model, backend="hero_fx", options={"interval": 2})`.

    `options` are those of `backend`; Inductor's own go into `options={"options": {...}}`.
    """
    return Backend(Config.from_options(dict(options or {})))(gm, inputs, mode=mode)
