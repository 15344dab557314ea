"""Which input of a model is the timestep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from hero_fx.passes.analysis.tokens import is_matmul
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import CASTS, LOOKUPS, RESHAPES, UNIT_AXES, overloads

from .checks import UnsupportedModel

__all__ = ["find_timestep", "is_table"]

aten = torch.ops.aten

_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")
_SCALES = CASTS | RESHAPES | UNIT_AXES | overloads(
    "mul", "div", "add", "sub", "rsub", "expand", "slice", "select", "outer", "ger", "einsum"
)  # fmt: skip
"""What may lie between the timestep and the sines and cosines of it: a scale, frequencies, an axis for the batch."""


def find_timestep(normal: fx.GraphModule, wanted: str | int | None) -> int:
    """Position of the graph input that carries the diffusion time.

    By argument (`wanted`: a name, or a position among the graph's inputs), else by structure: an input that a sinusoidal
    embedding is taken of; else one of [], [batch] or [batch, tokens] that has a usual name and is not used as text is.
    Names choose between inputs that the structure does not tell apart.

    Raises:
        UnsupportedModel: there is none, or `wanted` names none, or an input that is no timestep.
    """
    inputs = normal.graph.find_nodes(op="placeholder")
    tensors = [
        (i, node)
        for i, node in enumerate(inputs)
        # An input without readers is a Python number that dynamic=True made a tensor of, and its value is baked in.
        if node.meta.get("model_input") and isinstance(value_of(node), torch.Tensor) and node.users
    ]
    names = [node.meta["argument"] for _, node in tensors]
    if wanted is not None:
        for i, node in tensors:
            if wanted in (node.meta["argument"], node.name, i):
                _check_wanted(node, wanted)
                return i
        raise UnsupportedModel(
            f"timestep={wanted!r} names no tensor input of the graph; its tensor inputs are {', '.join(names) or 'none'}"
        )
    alike = [(i, node) for i, node in tensors if _why_not(node) is None]
    embedded = [(i, node) for i, node in alike if _feeds_sinusoid(node)]
    named = [(i, node) for name in _NAMES for i, node in alike if node.meta["argument"] == name]
    for i, _ in [*(pair for pair in named if pair in embedded), *embedded, *named]:
        return i
    raise UnsupportedModel(
        f"no timestep was found among the graph's inputs {_listed(tensors)}{_numbers(inputs, names)}; name it with "
        "hero_fx.backend(timestep='...'), and if the model is called with a Python number for it, pass a tensor"
    )


def _why_not(node: fx.Node) -> str | None:
    """Why an input cannot be a timestep; None if it can."""
    value = value_of(node)
    if value.is_complex() or value.dtype == torch.bool:
        return None  # as far as its shape goes; the first call says what is wrong with its dtype
    if _feeds_sinusoid(node):
        return None  # whatever its shape is: one time per frame may be [batch, 1, frames]
    if value.dim() > 2:
        return "it has more axes than batch and tokens"
    if value.dim() < 2 or value.shape[-1] == 1:
        return None
    for user in _beneath_scales(node):
        if user.target in LOOKUPS:
            return "each of its rows is looked up in a table, as text is"
        if is_matmul(user) and any(value_of(n).shape[-1:] == value.shape[-1:] for n in user.all_input_nodes[:1]):
            return "its rows go into a matrix product, as vectors do"
    return None


def _check_wanted(node: fx.Node, wanted: str | int) -> None:
    reason = _why_not(node)
    if reason is not None:
        shape = list(value_of(node).shape)
        raise UnsupportedModel(
            f"timestep={wanted!r} is {node.meta['argument']} {shape}, which is no timestep: {reason}; a timestep is [], "
            "[batch] or [batch, tokens]. Name the input that holds the diffusion time, or leave timestep out"
        )


def _listed(tensors: Sequence[tuple[int, fx.Node]]) -> str:
    """The tensor inputs, and why those with a timestep's name are none."""
    words = []
    for _, node in tensors:
        name, reason = node.meta["argument"], _why_not(node)
        words.append(f"{name} ({reason})" if reason and name in _NAMES else name)
    return ", ".join(words) or "(none are tensors)"


def _numbers(inputs: Sequence[fx.Node], names: Sequence[str]) -> str:
    scalars = [
        node.meta["argument"]
        for node in inputs
        if node.meta.get("model_input")
        and node.meta["argument"] not in names  # sizes of tensors
        and not (isinstance(value_of(node), torch.Tensor) and node.users)
    ]
    return f" (and the Python numbers {', '.join(scalars)})" if scalars else ""


def _feeds_sinusoid(node: fx.Node) -> bool:
    """True if sin and cos of (a scaled, broadcast copy of) the input are taken."""
    found = {user.target for user in _beneath_scales(node)}
    return {aten.sin.default, aten.cos.default} <= found


def _beneath_scales(node: fx.Node) -> set[fx.Node]:
    """What reads (a scaled, broadcast copy of) the input, and is more than such a copy."""
    seen, todo, readers = {node}, [node], set[fx.Node]()
    while todo:
        for user in todo.pop().users:
            if user.target not in _SCALES:
                readers.add(user)
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return readers


def is_table(normal: fx.GraphModule, timestep: fx.Node) -> bool:
    """Whether a timestep input is a table of times that each token looks its own up in (a packed sequence)."""
    values = {node for node in normal.graph.find_nodes(op="placeholder") if node.meta.get("model_input")}
    of_time = {timestep}
    for node in normal.graph.nodes:
        sources = node.all_input_nodes
        if node.op != "call_function" or of_time.isdisjoint(sources):
            values |= {node} if not values.isdisjoint(sources) else set()
        elif node.target in LOOKUPS and node.args[0] in of_time and not of_time.issuperset(sources):
            return True
        elif all(source in of_time or source not in values for source in sources):
            of_time.add(node)
        else:
            values.add(node)
    return False
