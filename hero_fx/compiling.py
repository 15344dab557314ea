"""Handing a graph to the inner compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hero_fx.passes import compat
from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.emit import value_of
from hero_fx.passes.rewrite.map_requests import map_requests
from hero_fx.passes.slots import StateSlot, slots_of
from hero_fx.runtime.batched import NotBatched
from hero_fx.runtime.stepper import Stepper
from hero_fx.runtime.steps import BatchedStep, CompiledStep

from . import dynamo
from .config import Config

__all__ = ["compile_batched", "compile_plain", "compile_step"]

aten = torch.ops.aten


def compile_step(source: fx.GraphModule | None, gm: fx.GraphModule, config: Config) -> CompiledStep:
    """Hands a step graph to the inner compiler; `source`: Dynamo's graph with the same first inputs, if there is one."""
    if source is not None:
        dynamo.copy_dynamo_marks(source, gm)
    inputs = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    mode = next(value.fake_mode for value in inputs if isinstance(value, compat.FakeTensor))
    run: dynamo.Compiled
    with compat.no_autocast():
        if config.inner == "eager" or callable(config.inner):
            compat.write_code(gm)
        if config.inner == "eager":
            run = gm.forward
        elif config.inner == "aot_eager":
            run = dynamo.compile_with_aot_eager(gm, inputs, mode)
        elif config.inner == "inductor":
            run = dynamo.compile_with_inductor(gm, inputs, mode, compile_mode=config.mode, options=config.options)
        else:
            assert callable(config.inner)
            run = config.inner(gm, inputs)
    run = dynamo.without_autocast(run)
    slots = list(slots_of(gm))
    device = next(value.device for value in inputs if isinstance(value, torch.Tensor))
    state = [value_of(node).device for node, _ in slots]
    return CompiledStep(run, tuple(slot for _, slot in slots), state[0] if state else device)


def compile_batched(config: Config, stepper: Stepper, kind: int | None, own: Sequence[bool], count: int) -> BatchedStep:
    """Compiles a step graph for several requests.

    Args:
        kind: of the cached step graphs; None is the full one.
        own: which of the model's inputs have rows for each request.
        count: requests.

    Raises:
        NotBatched: several processes run the model together, it writes to its inputs or buffers, or an op
            of it cannot run for each request by itself.
    """
    assert stepper.graphs is not None
    if stepper.inputs.shared:
        raise NotBatched(
            "hero_fx.batch: several processes run the model together, and no exchange between them is mapped over requests: "
            "call the model once for each request"
        )
    gm = stepper.graphs.full if kind is None else stepper.graphs.cached[kind]
    memory = Memory(gm.graph)
    inputs, slots = gm.graph.find_nodes(op="placeholder"), dict(slots_of(gm))
    writes = [node.name for node in inputs if node not in slots and memory.written(node)]
    if writes:
        raise NotBatched(
            f"hero_fx.batch: the model writes to its input or buffer {writes[0]}, which its requests would share: call the "
            "model once for each request"
        )
    try:
        mapped = map_requests(gm, [*own, *[True] * len(slots)], count)
    except RuntimeError as error:
        raise NotBatched(
            f"hero_fx.batch: the model has an op that cannot run for several requests at once ({_first_line(error)}): call the "
            "model once for each request"
        ) from error
    with torch.inference_mode(False):  # the first call that needs it may be in it
        step = compile_step(None, mapped, config)
    return BatchedStep(
        step,
        read=frozenset(
            slot for node, slot in slots.items() if isinstance(slot, StateSlot) and not _only_overwritten(node)
        ),
        written=frozenset(slot for node, slot in slots.items() if isinstance(slot, StateSlot) and memory.written(node)),
    )


def _only_overwritten(node: fx.Node) -> bool:
    return all(
        user.target is aten.copy_.default and user.args[0] is node and user.args[1] is not node for user in node.users
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def compile_plain(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> dynamo.Compiled:
    """What torch.compile does without hero_fx."""
    if config.inner == "eager":
        return gm.forward
    if config.inner == "inductor":
        return dynamo.inductor(config.mode, config.options)(gm, inputs)
    return dynamo.backend_named(config.inner)(gm, list(inputs))
