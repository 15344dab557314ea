"""An example call of somebody's model, and what of it makes a trajectory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hero_fx.backends import Backend
from hero_fx.config import Config
from hero_fx.find_timestep import find_timestep
from hero_fx.passes import compat
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import is_in_place
from hero_fx.source import Source
from hero_fx.step_graphs import StepGraphs

from .compiled import Call

__all__ = ["Example", "by_name", "look", "times_from", "twin_of"]

Model = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Example:
    """An example call of a model, and which of its tensors make it a trajectory."""

    model: Model
    call: Call
    steps: StepGraphs
    timestep: Tensor
    latents: tuple[Tensor, ...]
    weight: Tensor | None
    """A small parameter in front of the layers, that changes what all of them compute."""
    written: tuple[tuple[Tensor, Tensor], ...]
    """What the model itself writes to at each call (buffers), and its value before."""

    def restore(self) -> None:
        """Makes the next call start from the same buffers as the first: calls depend on their arguments alone."""
        with torch.no_grad():
            for tensor, before in self.written:
                tensor.copy_(before)

    def trajectory(self, length: int, seed: int) -> list[Call]:
        """Calls whose timestep travels and whose latents move by seeded noise; all else are the user's own objects."""
        generator = torch.Generator().manual_seed(seed)
        start = {id(x): _moved(x, generator, 0.5) for x in self.latents}
        calls = []
        for time in times_from(self.timestep, length):
            new = {id(x): _moved(start[id(x)], generator, 0.1) for x in self.latents} | {id(self.timestep): time}
            calls.append(Call(*compat.with_tensors((self.call.args, dict(self.call.kwargs)), new)))
        return calls


def _moved(x: Tensor, generator: torch.Generator, share: float) -> Tensor:
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    size = x.float().square().mean().sqrt().nan_to_num(nan=1.0, posinf=1.0)
    return (x.float() + share * torch.where(size > 0, size, 1.0) * noise).to(x.dtype)


def times_from(example: Tensor, length: int) -> list[Tensor]:
    """Timesteps of a trajectory that starts at an example of any shape, dtype and scale.

    It travels down, as most do, a twentieth of the example at a time; whole numbers too small for that travel up, one at a
    time, and so does zero. Tokens at time zero (conditioning) stay there, as long as others move.
    """
    largest = float(example.abs().max())
    still = (example == 0) & (largest > 0)
    if not example.is_floating_point():
        stride = max(1, int(largest) // 20)
        stride = -stride if largest >= stride * length else stride
        return [torch.where(still, example, (example + i * stride).clamp_min(0)) for i in range(length)]
    if largest == 0:
        return [example + i / 20 for i in range(length)]
    return [(example.double() * (1 - i / 20)).to(example.dtype) for i in range(length)]


def look(model: Model, call: Call, source: Source, config: Config) -> Example:
    """Finds what of a call a trajectory changes, in what Dynamo traced of it.

    Raises:
        ValueError: the model cannot be accelerated with these options, or its timestep or latents are no tensors of the call.
    """
    steps, tensors = Backend(config).steps_of(source), source.plain.inputs
    nodes = steps.normal.graph.find_nodes(op="placeholder")
    real = dict(zip(nodes, tensors, strict=True))
    given = {id(x) for x in compat.tensors_in((call.args, dict(call.kwargs)))}
    timestep = real[nodes[find_timestep(steps.normal, config.timestep)]]
    if id(timestep) not in given:
        raise ValueError(
            "the timestep that the graph reads is no tensor among the arguments of this call; pass it as a tensor, or name "
            "the right one with hero_fx.backend(timestep='...')"
        )
    ahead = _in_front_of_layers(steps)
    moving = [n for n in nodes if n.meta["model_input"] and id(real[n]) in given and real[n] is not timestep]
    latents = _latents(steps, [n for n in moving if real[n].is_floating_point()], ahead)
    weights = [n for n in nodes if isinstance(real[n], nn.Parameter) and real[n].is_floating_point()]
    return Example(
        model=model,
        call=call,
        steps=steps,
        timestep=timestep,
        latents=tuple(real[n] for n in latents),
        weight=min((real[n] for n in weights if n in ahead), key=Tensor.numel, default=None),
        written=tuple((real[n], real[n].clone()) for n in _written(steps.normal)),
    )


def by_name(model: Model, args: Sequence[Any], inputs: Mapping[str, Any]) -> Call:
    """The call with its arguments by name where they have one: names are what inputs are found by."""
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    named = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(named):
        return Call(tuple(args), dict(inputs))
    return Call((), {**{p.name: value for p, value in zip(named, args, strict=False)}, **inputs})


def _in_front_of_layers(steps: StepGraphs) -> set[fx.Node]:
    """What the image tokens come from, in front of the first layer."""
    nodes = {node.name: node for node in steps.normal.graph.nodes}
    images = [s for s in steps.structure.streams if steps.structure.image in s.tokens.sources]
    todo = [nodes[stream.root] for stream in images[:1] or steps.structure.streams[:1]]
    ahead = set(todo)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in ahead:
                ahead.add(source)
                todo.append(source)
    return ahead


def _latents(steps: StepGraphs, inputs: Sequence[fx.Node], ahead: set[fx.Node]) -> list[fx.Node]:
    """The inputs that are denoised: shaped like an output, else the largest that the image tokens come from."""
    shapes = {tuple(value_of(node).shape) for node in steps.normal.graph.output_node().all_input_nodes}
    entering = [node for node in inputs if node in ahead]
    alike = [node for node in entering if tuple(value_of(node).shape) in shapes]
    found = alike or sorted(entering, key=lambda node: value_of(node).numel())[-1:]
    if not found:
        names = ", ".join(node.meta["argument"] for node in inputs) or "none"
        raise ValueError(
            f"no floating-point tensor among the arguments (there are: {names}) leads to the model's image tokens, so there "
            "are no latents to move along a trajectory; pass them as a tensor"
        )
    return found


def _written(gm: fx.GraphModule) -> list[fx.Node]:
    """The graph inputs that the model writes to, itself or through views."""
    found: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        target = node.args[0] if is_in_place(node) else None
        while isinstance(target, fx.Node) and target.op == "call_function" and target.args:
            target = target.args[0]
        if isinstance(target, fx.Node) and target.op == "placeholder":
            found[target] = None
    return list(found)


def twin_of(model: nn.Module, weight: Tensor) -> nn.Module | None:
    """A second model of the same class, whose weights are the model's own tensors but for `weight`, to which noise is added.

    None if the parameter is not found, or lies in a module whose forward is bound to that very object (by a hook).
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is weight:
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.device)
                value = weight.detach() + (0.1 * (weight.detach().float().abs().mean() + 0.1) * noise).to(weight.dtype)
                return _with_parameter(model, path.split(".") if path else [], name, nn.Parameter(value, False))
    return None


def _with_parameter(module: nn.Module, path: Sequence[str], name: str, value: nn.Parameter) -> nn.Module | None:
    """A module that shares all with `module` but one parameter below `path`."""
    if "forward" in vars(module):
        return None
    copy = type(module).__new__(type(module))
    copy.__dict__.update(vars(module))
    copy.__dict__.pop("_diffusers_hook", None)  # it holds on to the module it was made for
    copy.__dict__.pop("_compiled_call_impl", None)
    if not path:
        copy.__dict__["_parameters"] = {**module._parameters, name: value}
        return copy
    inner = module._modules[path[0]]
    child = None if inner is None else _with_parameter(inner, path[1:], name, value)
    copy.__dict__["_modules"] = {**module._modules, path[0]: child}
    return copy if child is not None else None
