"""Adding nodes to a normalised graph: every new node gets its fake value, and state is explicit in and explicit out.

A rewritten graph has the inputs of the graph it came from, then extra inputs in the order the passes made them. What
an extra input means is in `node.meta["slot"]`, a typed key of `slots`; the runtime fills them by slot:

=============  ==================================================================================
`StateSlot`    a tensor of feature state, updated in place by a `copy_` at the end of the graph
`ScalarSlot`   a 0-d tensor with a number of this call (steps since the last full step, ...)
`IndexSlot`    the selection of this step: indices [K] of the sampled image tokens
`RowsSlot`     the rows of the batch that this run computes
`TableSlot`    coefficients of this step from a calibrated plan, by channel
=============  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from .compat import FakeTensor, FakeTensorMode, unbound_sizes
from .ops import has_side_effect
from .slots import IndexSlot, RowsSlot, ScalarSlot, Slot, StateSlot, TableSlot, slots_of

__all__ = ["Emitter", "by_name", "drop_dead_code", "value_of"]

aten = torch.ops.aten


def value_of(node: fx.Node) -> Any:
    """The fake value of a node of a normalised graph (for an output with several values, a tuple)."""
    return node.meta["val"]


def by_name(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes of a graph by their names. A pass makes it once: made anew for every branch, it costs depth squared."""
    return {node.name: node for node in gm.graph.nodes}


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise AssertionError("a normalised graph has a fake value at every node")


class Emitter:
    """Inserts nodes into the graph of `gm`, in front of a chosen node, with their fake values."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.mode = fake_mode_of(gm)
        self.output: fx.Node = self.graph.output_node()
        self._slots = {slot: node for node, slot in slots_of(gm)}
        self._last_input: fx.Node | None = None
        self._stack: dict[str, Any] = {}

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New nodes go in front of `node` and are named after the same module."""
        previous, self._stack = (
            self._stack,
            {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta},
        )
        with self.graph.inserting_before(node):
            yield
        self._stack = previous

    def after(self, node: fx.Node) -> Any:
        """New nodes go right behind `node`."""
        return self.before(node.next)

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `op`; nodes among the arguments stand for their values."""
        node = self.graph.create_node("call_function", op, args, kwargs)
        node.meta.update(self._stack)
        self.revalue(node)
        return node

    def revalue(self, node: fx.Node) -> None:
        """Computes the fake value of a node from those of its arguments."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        with self.mode, torch.no_grad(), unbound_sizes(self.mode):
            assert callable(node.target)
            node.meta["val"] = node.target(*args, **kwargs)

    def inline(self, function: Callable[..., torch.Tensor], *args: fx.Node) -> fx.Node:
        """The nodes of a plain PyTorch function of tensors, traced and copied in; returns its result."""
        with self.mode, torch.no_grad():
            traced = make_fx(function, pre_dispatch=True)(*[value_of(a) for a in args])
        traced.graph.eliminate_dead_code()
        env: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), args, strict=True))
        for node in traced.graph.nodes:
            if node.op == "call_function":
                env[node] = self.graph.node_copy(node, env.__getitem__)
                env[node].meta.update(self._stack)
        (result,) = traced.graph.output_node().args
        assert isinstance(result, fx.Node), "an inlined function returns one tensor"
        return env[result]

    def state(self, slot: StateSlot, like: torch.Tensor, dtype: torch.dtype | None = None) -> fx.Node:
        """The input for a tensor of feature state with the shape and device of `like`, contiguous.

        `dtype` stores floating-point features in another dtype than their own.
        """
        return self._input(slot, like, static=True, dtype=dtype if like.is_floating_point() else None)

    def read(self, state: fx.Node, like: torch.Tensor) -> fx.Node:
        """The value of a state input in the dtype of `like`."""
        if value_of(state).dtype == like.dtype:
            return state
        return self.call(aten.to.dtype, state, like.dtype)

    def scalar(self, slot: ScalarSlot, device: torch.device) -> fx.Node:
        """The input for a 0-d float32 tensor; 0-d tensors do not promote the dtype of what they scale."""
        with self.mode:
            like = torch.empty((), dtype=torch.float32, device=device)
        return self._input(slot, like)

    def selection(self, slot: IndexSlot, count: int, device: torch.device) -> fx.Node:
        """The input for a selection: int64 indices [count] of sampled tokens."""
        with self.mode:
            like = torch.empty(count, dtype=torch.int64, device=device)
        return self._input(slot, like)

    def rows(self, count: int, device: torch.device) -> fx.Node:
        """The input for the rows of the batch that a run computes: int64 indices [count]."""
        with self.mode:
            like = torch.empty(count, dtype=torch.int64, device=device)
        return self._input(RowsSlot(count), like)

    def table(self, slot: TableSlot, device: torch.device) -> fx.Node:
        """The input for a float32 tensor of coefficients; products with it are float32 at least."""
        with self.mode:
            like = torch.empty(slot.shape, dtype=torch.float32, device=device)
        return self._input(slot, like)

    def erase_input(self, node: fx.Node) -> None:
        """Removes an extra input that nothing reads."""
        self._last_input = None
        del self._slots[node.meta["slot"]]
        self.graph.erase_node(node)

    def write_back(self, state: fx.Node, value: fx.Node) -> None:
        """`state` becomes `value` at the end of the graph, after everything that reads it."""
        with self.before(self.output):
            self.call(aten.copy_.default, state, value)

    def _input(
        self, slot: Slot, like: torch.Tensor, *, static: bool = False, dtype: torch.dtype | None = None
    ) -> fx.Node:
        if slot in self._slots:
            return self._slots[slot]
        if self._last_input is None:
            self._last_input = list(self.graph.find_nodes(op="placeholder"))[-1]
        with self.graph.inserting_after(self._last_input):
            node = self.graph.create_node("placeholder", slot.name, name=slot.name)
        node.target = node.name
        with self.mode:
            node.meta["val"] = torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)
        node.meta["slot"] = slot
        if static:
            node.meta["static_address"] = True
        self._slots[slot] = self._last_input = node
        return node


def drop_dead_code(graph: fx.Graph) -> int:
    """Removes unused nodes that have no side effect; in-place ops and graph inputs stay."""
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=has_side_effect)
    return before - len(graph.nodes)
