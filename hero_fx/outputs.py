"""Policy `"forecast"`: cached steps forecast the model's outputs, and run no layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import PROJECTIONS, node_argument
from hero_fx.passes.rewrite.forecast import OutputRule, arguments_of, outputs_of

from .checks import UnsupportedModel

__all__ = ["check_outputs", "find_outputs"]


def check_outputs(normal: fx.GraphModule, rules: Sequence[OutputRule]) -> None:
    """Refuses rules that do not fit the model's outputs and inputs."""
    outputs = outputs_of(normal)
    names = arguments_of(normal)
    found = {i for i, output in enumerate(outputs) if _is_forecast(output)}
    ruled = {rule.index for rule in rules}
    if found != ruled:
        raise UnsupportedModel(
            f"the model returns {len(found)} floating-point tensors, at positions {sorted(found)} of its outputs, and the "
            f"plan forecasts those at {sorted(ruled)}: calibrate a plan for this model, called in the same way"
        )
    for rule in rules:
        output = outputs[rule.index]
        shape = value_of(output).shape
        axes = [axis for axis in (rule.axis, rule.frames) if axis is not None]
        if any(axis >= len(shape) for axis in axes):
            raise UnsupportedModel(f"output {rule.index} has shape {list(shape)}, and the plan's has axes {axes}")
        if rule.groups > 1 and shape[0] % rule.groups:
            raise UnsupportedModel(
                f"output {rule.index} has a batch of {shape[0]}, and the plan has coefficients for {rule.groups} equal parts "
                "of it: it was calibrated with guidance as a batch; run it so, or calibrate without guidance"
            )
        if rule.latent is None:
            continue
        if rule.latent not in names:
            raise UnsupportedModel(
                f"the plan reads the latent of output {rule.index} from argument {rule.latent!r}, and the model's arguments "
                f"are {', '.join(names)}: calibrate a plan for this model, called in the same way"
            )
        if not _fits(value_of(names[rule.latent]), shape, rule):
            raise UnsupportedModel(
                f"argument {rule.latent!r} has shape {list(value_of(names[rule.latent]).shape)}, which holds no latent of "
                f"output {rule.index} with shape {list(shape)} from channel {rule.start} on"
            )


def _fits(latent: torch.Tensor, shape: torch.Size, rule: OutputRule) -> bool:
    if latent.shape == shape:
        return rule.start == 0
    if rule.axis is None or latent.dim() != len(shape):
        return False
    others = [axis for axis in range(len(shape)) if axis != rule.axis]
    enough = rule.start + shape[rule.axis] <= latent.shape[rule.axis]
    return enough and all(latent.shape[axis] == shape[axis] for axis in others)


def _is_forecast(output: object) -> bool:
    """A computed floating-point tensor; whole numbers, and what is passed through, stay as they are."""
    if not isinstance(output, fx.Node) or output.op == "placeholder":
        return False
    value = value_of(output)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def find_outputs(
    normal: fx.GraphModule, timestep: int, latent: str | Sequence[str] | None = None
) -> tuple[OutputRule, ...]:
    """A rule for every output, with the argument that its latent may be in; which of its channels is told by running it.

    An argument holds the latent of an output if it has its shape, or more channels. Of several the one of exactly its shape
    wins, then the first.

    Args:
        timestep: position of the timestep among the inputs, which is no latent.
        latent: names of the only arguments to consider.

    Raises:
        ValueError: `latent` names no argument that could be one.
    """
    wanted = [latent] if isinstance(latent, str) else latent
    time = normal.graph.find_nodes(op="placeholder")[timestep]
    floats = {name: node for name, node in arguments_of(normal).items() if _is_float(node) and node is not time}
    candidates = {name: node for name, node in floats.items() if wanted is None or name in wanted}
    rules, used = [], set()
    for index, output in enumerate(outputs_of(normal)):
        if not _is_forecast(output):
            continue
        assert isinstance(output, fx.Node)
        rule = OutputRule(index=index, axis=None)
        shape = value_of(output).shape
        options = [
            (name, axis) for name, n in candidates.items() if (axis := _axis(value_of(n).shape, shape)) is not None
        ]
        options.sort(key=lambda option: value_of(candidates[option[0]]).shape != shape)
        if options:
            name, axis = options[0]
            used.add(name)
            rule = replace(rule, axis=_channels(candidates[name]) if axis == _SAME else axis, latent=name)
        elif len(shape) > 1:
            rule = replace(rule, axis=1 if len(shape) in (4, 5) else len(shape) - 1)
        rules.append(rule)
    if wanted is not None and (unused := set(wanted) - used):
        raise ValueError(
            f"latent={latent!r}: {', '.join(sorted(unused))} is no floating-point argument with the shape of an output, or "
            f"more channels; the model's are {', '.join(floats)}"
        )
    if not rules:
        raise UnsupportedModel("the model returns no floating-point tensor, so there is nothing to forecast")
    return tuple(rules)


_SAME = -1


def _axis(shape: torch.Size, of: torch.Size) -> int | None:
    """The axis along which an input of `shape` has more than an output of shape `of`; `_SAME` where they are equal."""
    if len(shape) != len(of) or len(of) < 2:
        return None
    differ = [axis for axis in range(len(of)) if shape[axis] != of[axis]]
    if not differ:
        return _SAME
    return differ[0] if len(differ) == 1 and differ[0] and shape[differ[0]] > of[differ[0]] else None


def _channels(node: fx.Node) -> int:
    """The channel axis of an input: the one whose size the first projection or convolution of it takes."""
    shape = value_of(node).shape
    usual = 1 if len(shape) in (4, 5) else len(shape) - 1
    seen, todo = {node}, [node]
    while todo:
        current = todo.pop(0)
        for user in current.users:
            if user.target in PROJECTIONS and user.args[0] is current:
                width = value_of(node_argument(user, "weight")).shape[1]
                found = [axis for axis in range(1, len(shape)) if shape[axis] == width]
                return usual if not found or usual in found else found[0]
            if user not in seen and user.op == "call_function" and len(seen) < 64:
                seen.add(user)
                todo.append(user)
    return usual


def _is_float(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()
