"""Handing a graph to the inner compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hero_fx.passes import compat
from hero_fx.passes.emit import value_of
from hero_fx.passes.slots import slots_of
from hero_fx.runtime.stepper import CompiledStep

from . import dynamo
from .config import Config

__all__ = ["compile_step"]


def compile_step(source: fx.GraphModule, gm: fx.GraphModule, config: Config) -> CompiledStep:
    """Hands a step graph to the inner compiler."""
    dynamo.copy_dynamo_marks(source, gm)
    inputs = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    mode = next(value.fake_mode for value in inputs if isinstance(value, compat.FakeTensor))
    run: dynamo.Compiled
    with compat.no_autocast():
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


def compile_plain(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> dynamo.Compiled:
    """What torch.compile does without hero_fx."""
    if config.inner == "eager":
        return gm.forward
    if config.inner == "inductor":
        return dynamo.inductor(config.mode, config.options)(gm, inputs)
    return dynamo.backend_named(config.inner)(gm, list(inputs))
