"""Telling whether a model is the one that a plan was calibrated on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.emit import value_of
from hero_fx.passes.rewrite.forecast import OutputRule, outputs_of

from . import dynamo
from .checks import UnsupportedModel
from .config import Config
from .plan import Fingerprint, Plan
from .stack import warn

__all__ = ["check_fingerprint", "fingerprint_of", "model_config"]


def fingerprint_of(
    normal: fx.GraphModule, structure: Structure, module: torch.nn.Module | None, outputs: Sequence[OutputRule]
) -> Fingerprint:
    """The fingerprint of a model, from its normalised graph and its module, where that is known."""
    values = outputs_of(normal)
    sizes = [
        tuple(int(value_of(values[rule.index]).shape[axis]) for axis in (rule.axis, rule.frames) if axis is not None)
        for rule in outputs
    ]
    return Fingerprint(
        name=type(module).__name__ if module is not None else "",
        config=model_config(module),
        depth=structure.depth,
        width=structure.streams[0].width if structure.streams else 0,
        outputs=tuple(sizes),
    )


def model_config(module: torch.nn.Module | None) -> dict[str, Any]:
    """What a diffusers (or transformers) model says it was made with; values that JSON does not hold are left out."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not hasattr(config, "items"):
        return {}
    kept = {}
    for name, value in config.items():
        if isinstance(name, str) and not name.startswith("_"):
            try:
                kept[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError):
                continue
    return kept


def check_fingerprint(config: Config, normal: fx.GraphModule, structure: Structure) -> None:
    """Refuses a model that the plan of `config` was not calibrated on, or warns of it.

    Raises:
        UnsupportedModel: something differs, or the batch of an output is no multiple of the plan's, and
            `plan_mismatch="error"`.
    """
    plan = config.plan
    assert isinstance(plan, Plan)
    values = outputs_of(normal)
    fits = all(
        rule.index < len(values) and _has_axes(values[rule.index], rule) for rule in plan.outputs
    )  # what does not fit at all is refused by what builds the steps
    differs = (
        plan.model.differences(fingerprint_of(normal, structure, dynamo.frame_module(), plan.outputs))
        if fits and plan.model is not None
        else []
    )
    batches = {
        int(value_of(values[rule.index]).shape[0])
        for rule in plan.outputs
        if fits and value_of(values[rule.index]).dim()
    }
    differs += [
        f"the batch of the output is {batch} here and {plan.batch} per sample in the plan (another guidance mode)"
        for batch in batches
        if batch % plan.batch
    ]
    if not differs:
        return
    message = f"the plan was calibrated on another model: {'; '.join(differs)}"
    if config.plan_mismatch == "error":
        raise UnsupportedModel(f"{message}. Calibrate a plan for this model, or pass plan_mismatch='warn' to go on")
    warn(f"hero_fx: {message}")


def _has_axes(output: object, rule: OutputRule) -> bool:
    value = value_of(output) if isinstance(output, fx.Node) else None
    axes = [axis for axis in (rule.axis, rule.frames) if axis is not None]
    return isinstance(value, torch.Tensor) and all(axis < value.dim() for axis in axes)
