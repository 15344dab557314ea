"""Forecasts of the model's outputs: a cached step that runs no layer.

A full step keeps what it was given and what it gave, and a cached step combines the last of these linearly. With i > j > l
the last full steps before step k, v an output, x the noisy latent that it belongs to, c a channel:

    v_k  =  (1 + θ0) v_i + θ1 (v_i - v_j) + θ2 (v_i - v_l) + θ3 (x_k - x_i) + θ4 (x_i - x_j),      θ = θ[k; c]

The coefficients θ come from a plan that was calibrated before the run (`hero_fx.calibrate`). Multiplied out, each value has
one weight, and those are what a step graph is given: `v0`, `v1`, `v2` for v_i, v_j, v_l; `x` for x_k; `x0`, `x1` for x_i, x_j.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import fx

from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.slots import PastSlot, RowsSlot, TableSlot, Term, slots_of

__all__ = ["THETAS", "ForecastOutputs", "OutputRule", "RecordOutputs", "arguments_of", "combination", "outputs_of"]

aten = torch.ops.aten

THETAS = 5
"""Coefficients of an output with three past values and a latent."""

_NOW = Term("x")
"""The latent of the step itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputRule:
    """How one output of a model is forecast."""

    index: int
    """Its position among the outputs of the graph."""
    axis: int | None
    """Its channels; None: all elements share their coefficients."""
    frames: int | None = None
    """Its frames, where each has coefficients of its own."""
    groups: int = 1
    """Equal parts of the batch with coefficients of their own: 2 for the halves of classifier-free guidance."""
    latent: str | None = None
    """The argument that holds its noisy latent; None: it is forecast from past outputs alone."""
    start: int = 0
    """The first channel of the latent in that argument."""
    history: int = 3
    """How many past outputs are kept: 1, 2 or 3."""

    @property
    def table(self) -> str:
        """The name of its coefficients in a plan."""
        return f"out{self.index}"

    @property
    def terms(self) -> tuple[Term, ...]:
        """What is combined."""
        past = self._past("v")
        return past if self.latent is None else (*past, _NOW, *self._past("x"))

    def past(self, of: Literal["v", "x"]) -> list[PastSlot]:
        """State for its last values, or for its latents at that time, the newest first."""
        return [PastSlot(self.table, term) for term in self._past(of)]

    def _past(self, of: Literal["v", "x"]) -> tuple[Term, ...]:
        return tuple(Term(of, number) for number in range(self.history if of == "v" else 2))

    def shape(self, of: torch.Size) -> tuple[int, ...]:
        """The shape of its coefficients for an output of that shape: they broadcast to it."""
        kept = {axis: of[axis] for axis in (self.axis, self.frames) if axis is not None}
        if self.groups > 1:
            kept[0] = of[0]
        return tuple(kept.get(axis, 1) for axis in range(len(of)))


def combination(theta: Sequence[torch.Tensor], rule: OutputRule) -> dict[Term, torch.Tensor]:
    """The weight of each term from θ0 .. θ4 (those of missing terms are not read), by multiplying out."""
    newest = Term("v", 0)
    weights = {newest: 1 + theta[0]}
    for number in range(1, rule.history):
        weights |= {newest: weights[newest] + theta[number], Term("v", number): -theta[number]}
    if rule.latent is not None:
        weights |= {_NOW: theta[3], Term("x", 0): theta[4] - theta[3], Term("x", 1): -theta[4]}
    return weights


def outputs_of(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What the graph returns, in order."""
    own = gm.graph.output_node().args[0]
    assert isinstance(own, (tuple, list)), "Dynamo's graphs return a tuple"
    return tuple(own)


def arguments_of(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The tensors that a caller passes, by name; those that came as `*args` have one name, and are numbered in the order
    in which the model reads them: `args[0]`."""
    # Sizes that Dynamo makes inputs have the names of the tensors that they are of.
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [n for n in placeholders if n.meta.get("model_input") and isinstance(value_of(n), torch.Tensor)]
    names = [str(node.meta["argument"]) for node in inputs]
    seen: Counter[str] = Counter()
    result = {}
    for name, node in zip(names, inputs, strict=True):
        result[name if names.count(name) == 1 else f"{name}[{seen[name]}]"] = node
        seen[name] += 1
    return result


def _latent(emitter: Emitter, rule: OutputRule, output: fx.Node) -> fx.Node:
    """The noisy latent of an output: an input, or the channels of it that are one; call inside `emitter.before(...)`."""
    assert rule.latent is not None
    source = arguments_of(emitter.gm)[rule.latent]
    of = value_of(output).shape
    rows = next((node for node, slot in slots_of(emitter.gm) if isinstance(slot, RowsSlot)), None)
    if rows is not None:
        source = emitter.call(aten.index_select.default, source, 0, rows)
    if value_of(source).shape == of or rule.axis is None:
        return source
    return emitter.call(aten.slice.Tensor, source, rule.axis, rule.start, rule.start + of[rule.axis])


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordOutputs:
    """Keeps a model's last outputs, and the latents they belong to.

    Before::

        linear = aten.linear.default(x, weight)
        return (linear,)

    After, with two past outputs and no latent::

        linear = aten.linear.default(x, weight)
        copy_ = aten.copy_.default(out0_v1, out0_v0)  # what was the last is the one before
        copy__1 = aten.copy_.default(out0_v0, linear)
        return (linear,)

    Legal because it only adds readers of existing values and writes to inputs that nothing reads after the write: all
    `copy_` stand at the end, the oldest value first. The outputs are those of the untouched graph, bit for bit.
    """

    rules: tuple[OutputRule, ...]
    state_dtype: torch.dtype | None = None
    name: str = "record_outputs"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        outputs = outputs_of(gm)
        for rule in self.rules:
            output = outputs[rule.index]
            assert isinstance(output, fx.Node)
            self._shift(emitter, rule.past("v"), output)
            if rule.latent is not None:
                with emitter.before(emitter.output):
                    latent = _latent(emitter, rule, output)
                self._shift(emitter, rule.past("x"), latent)
        return len(self.rules)

    def _shift(self, emitter: Emitter, slots: list[PastSlot], newest: fx.Node) -> None:
        # The oldest comes first among the inputs too: AOTAutograd writes inputs back in their order, and Inductor reads a
        # value that is an input itself only when it writes it, so the other way round all would become the newest.
        states = [emitter.state(slot, value_of(newest), self.state_dtype) for slot in reversed(slots)]
        for older, newer in pairwise(states):
            emitter.write_back(older, newer)
        emitter.write_back(states[-1], newest)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastOutputs:
    """Returns a linear combination of past outputs and latents in the place of a model's output.

    Before::

        linear = aten.linear.default(x, weight)
        return (linear,)

    After, with two past outputs and no latent (dead code is removed by a later pass)::

        mul = aten.mul.Tensor(out0_v0, out0_v0_weight)  # f32[1, C, 1, 1], from the plan
        mul_1 = aten.mul.Tensor(out0_v1, out0_v1_weight)
        add = aten.add.Tensor(mul, mul_1)
        return (add,)

    Legal by the plan's word only: this changes numerics. What is exact is that only what the graph returns changes, that
    it keeps its shape and dtype, and that sums are taken in float32 at least.
    """

    rules: tuple[OutputRule, ...]
    state_dtype: torch.dtype | None = None
    name: str = "forecast_outputs"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        outputs = list(outputs_of(gm))
        for rule in self.rules:
            output = outputs[rule.index]
            assert isinstance(output, fx.Node)
            with emitter.before(emitter.output):
                outputs[rule.index] = self._forecast(emitter, rule, output)
        emitter.output.args = (tuple(outputs),)
        return len(self.rules)

    def _forecast(self, emitter: Emitter, rule: OutputRule, output: fx.Node) -> fx.Node:
        like = value_of(output)
        total: fx.Node | None = None
        for term in rule.terms:
            source = _latent(emitter, rule, output) if term.of == "x" else output
            if term != _NOW:
                source = emitter.state(PastSlot(rule.table, term), value_of(source), self.state_dtype)
            weight = emitter.table(TableSlot(rule.table, term, rule.shape(like.shape)), like.device)
            if not value_of(source).dtype.is_floating_point or value_of(source).dtype.itemsize == 1:
                source = emitter.call(aten.to.dtype, source, like.dtype)  # 8-bit floats do not multiply
            product = emitter.call(aten.mul.Tensor, source, weight)
            total = product if total is None else emitter.call(aten.add.Tensor, total, product)
        assert total is not None
        if value_of(total).dtype != like.dtype:
            total = emitter.call(aten.to.dtype, total, like.dtype)
        return total
