"""Models of the zoo, traced once for many backends, and trajectories of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx

import hero_fx
from hero_fx import backends
from hero_fx.backends import Backend
from hero_fx.compiling import compile_step
from hero_fx.config import Config
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.compat import argument_name, lazy_code
from hero_fx.passes.slots import StateSlot, slot_of, slots_of
from hero_fx.policy import Policy
from hero_fx.runtime.stepper import CompiledStep, Stepper
from hero_fx.source import Source
from hero_fx.step_graphs import StepGraphs

from .examples import example
from .tracing import capture
from .zoo_reference import Hooked

zoo = example("_zoo")
STEPS = 7
FULL = [True, True, False, False, True, False, False]


@dataclass
class Found:
    """A model of the zoo, traced once."""

    name: str
    sample: Any
    gm: Any
    inputs: list[Any]
    source: Source
    fulls: dict[fx.GraphModule, CompiledStep] = field(default_factory=dict)
    """Full steps that went through AOTAutograd."""

    @property
    def structure(self) -> Structure:
        return self.source.normal(())[2]

    def stepper(self, **options: Any) -> tuple[Stepper, StepGraphs]:
        """What a backend with other options makes of the traced model.

        AOTAutograd gets no full step that is a part of one it had before: that one runs in its place, and records more.
        """
        backend = backend_for(self.sample, **options)
        policy, kept = backend.config.make_policy(), self.fulls if backend.config.inner == "aot_eager" else {}
        assert isinstance(policy, Policy)
        with torch.no_grad(), lazy_code():  # as in Dynamo
            steps = backend.steps_of(self.source)
            whole = steps.full
            if kept:
                read = {slot for gm in steps.cached for _, slot in slots_of(gm) if isinstance(slot, StateSlot)}
                whole = next((gm for gm in kept if expressions(steps.full) <= expressions(gm)), whole)
                assert whole is steps.full or read <= written(steps.full), "a step that records more would hide it"
                steps = replace(steps, full=whole)

            def once(source: fx.GraphModule, gm: fx.GraphModule, config: Config) -> CompiledStep:
                compiled = kept[gm] if gm in kept else compile_step(source, gm, config)
                if gm is whole:
                    kept[gm] = compiled
                return compiled

            timestep = _position(self.gm, self.sample.time)
            with patch.object(backends, "compile_step", once):
                return backend._compile(self.gm, self.inputs, backend.config, policy, steps, timestep), steps

    @cached_property
    def plain(self) -> list[Tensor]:
        """The trajectory of the model itself."""
        return trajectory(self, self.gm)

    def call(self, run: Any, share: float) -> Tensor:
        """The model's first output at a share of the trajectory, by a compiled graph of it."""
        moved = self.sample.at(share)
        values = list(self.inputs)
        for name in (self.sample.time, self.sample.latents):
            value = moved[name]
            values[_position(self.gm, name)] = value[0] if isinstance(value, list) else value
        with torch.no_grad():
            result = run(*values)
        return result[0]  # type: ignore[no-any-return]


def expressions(gm: fx.GraphModule) -> Counter[int]:
    """What a graph computes and writes: each node with all that it is computed from, down to the inputs."""
    known: dict[fx.Node, int] = {}

    def of(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", known[value])
        if isinstance(value, dict):
            return {name: of(item) for name, item in value.items()}
        return [of(item) for item in value] if isinstance(value, tuple | list) else value

    for node in gm.graph.nodes:
        source = node.meta.get("slot", node.name) if node.op == "placeholder" else of((node.args, node.kwargs))
        known[node] = hash((node.op, str(node.target) if node.op != "placeholder" else "", repr(source)))
    return Counter(known.values())


def written(gm: fx.GraphModule) -> set[Any]:
    """The state that a full step writes."""
    writes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {slot for node in writes if (slot := slot_of(node.args[0])) is not None}


def backend_for(sample: Any, **options: Any) -> Backend:
    settings: dict[str, Any] = {"inner": "eager", "schedule": FULL, "timestep": sample.time}
    if options["policy"] == "hero":
        settings |= {"refresh_ratio": 0.4, "patch": (1, 1, 2), "grid": sample.grid}
    return hero_fx.backend(**{**settings, **options})


def _position(gm: Any, name: str) -> int:
    names = [argument_name(node) for node in gm.graph.find_nodes(op="placeholder")]
    return names.index(name)


@lru_cache(maxsize=2)
def found(name: str) -> Found:
    """A model of the zoo, traced; `conftest.py` has the tests of one model in a row."""
    sample = zoo.sample(name)
    gm, inputs = capture(sample.model, **sample.inputs, return_dict=False)
    torch._dynamo.reset()
    return Found(name, sample, gm, inputs, Source(gm, inputs))


def first(value: Any) -> Tensor:
    """The first tensor of a model's output."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def trajectory(model: Found, run: Any) -> list[Tensor]:
    return [first(model.call(run, step / STEPS)) for step in range(STEPS)]


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = float((a - b).abs().max() / b.abs().max())
        assert error < tolerance, f"step {step}: {error}"


def hooked(model: Found, reference: Hooked, rows: Any = None) -> list[Tensor]:
    """The trajectory by hooks; `rows(pattern)` are the sampled tokens of a cached step."""
    outputs, last, before, fulls = [], 0, 0, 0
    for step, full in enumerate(FULL):
        if full:
            before, last = last, step
        inputs = model.sample.at(step / STEPS)
        index = None if full or rows is None else rows(tuple(FULL[: step + 1]))
        out = reference.call(inputs, full=full, x=step - last, d=last - before or 1, fulls=fulls, rows=index)
        fulls += full
        outputs.append(first(out))
    return outputs
