"""One vocabulary for every model: a Dynamo graph becomes a flat, pre-dispatch ATen graph.

`normalize` traces Dynamo's graph anew under fake tensors. Pre-dispatch tracing keeps `aten.linear`, `aten.layer_norm` and
`aten.scaled_dot_product_attention` whole. It also keeps the module that a node came from (`nn_module_stack`), by which
reports name layers. The other passes of this folder then make the graph easy to reason about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from hero_fx.passes import compat

from .unmap import without_maps

__all__ = ["normalize"]

aten = torch.ops.aten


class _Traced(fx.Interpreter):
    """Runs a graph so that each traced node inherits the meta of the node that made it, and autocast regions are on."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._regions: list[Any] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            for region in reversed(self._regions):  # what raised has left them open
                region.__exit__(None, None, None)

    def run_node(self, n: fx.Node) -> Any:
        with fx.traceback.set_current_meta(n):
            return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # Traced, the function that Dynamo writes leaves a node and does nothing: values in a region would have wrong dtypes.
        if target is compat.enter_autocast:
            self._regions.append(torch.autocast(*args))
            return self._regions[-1].__enter__()
        if target is compat.exit_autocast:
            return self._regions.pop().__exit__(None, None, None)
        return super().call_function(target, args, kwargs)


class _Interpreted(torch.nn.Module):
    """A graph as a module, whose attributes `functional_call` can replace."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, *inputs: Any) -> Any:
        return _Traced(self.gm).run(*inputs)


def normalize(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The pre-dispatch ATen graph of a Dynamo graph, with the same inputs in the same order.

    Args:
        gm: the graph Dynamo gave to the backend.
        inputs: its example inputs, real or fake; symbolic ints are taken at their present value.

    Every node of the result has its value in `meta["val"]`: a fake tensor, all of one fake mode, with static sizes, or
    the number that an input is. Weights that `gm` holds as attributes are attributes of the result, the same tensors.
    """
    mode = compat.new_fake_mode()
    fakes = [compat.to_fake(mode, value) for value in inputs]
    held = _held_tensors(gm)
    with mode, torch.no_grad(), fx.traceback.preserve_node_meta(), compat.lazy_code():
        # Real tensors take no part in the trace: tracing would write to them what the graph writes, and leave no node.
        weights = [compat.to_fake(mode, tensor) for tensor in held.values()]
        plain = _Interpreted(without_maps(gm, fakes))

        def run(*values: Any) -> Any:
            own = dict(zip(held, values[len(fakes) :], strict=True))
            return functional_call(plain, {f"gm.{name}": value for name, value in own.items()}, values[: len(fakes)])

        traced = make_fx(run, pre_dispatch=True)(*fakes, *weights)
    _inputs_to_attributes(traced, held)
    for node in traced.graph.nodes:
        # Of Dynamo's nodes, whose graph is gone. AOTAutograd copies all that stands there for every node that it traces.
        node.meta.pop("from_node", None)
    old_inputs, new_inputs = (graph.find_nodes(op="placeholder") for graph in (gm.graph, traced.graph))
    for old, new, fake in zip(old_inputs, new_inputs, fakes, strict=True):
        compat.rename(new, _readable(old.name))
        new.target = new.name
        new.meta.setdefault("val", fake)  # make_fx gives none to numbers
        new.meta["argument"] = compat.argument_name(old)
        new.meta["model_input"] = compat.is_model_input(old)
    traced.recompile()
    return traced


def _held_tensors(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a graph's module, each under one of its names; with Dynamo's usual settings none."""
    return {**dict(gm.named_parameters()), **dict(gm.named_buffers())}


def _inputs_to_attributes(traced: fx.GraphModule, held: Mapping[str, torch.Tensor]) -> None:
    """Makes attributes of the last inputs of a graph, which stand for these tensors."""
    placeholders = traced.graph.find_nodes(op="placeholder")
    for node, (name, tensor) in zip(placeholders[len(placeholders) - len(held) :], held.items(), strict=True):
        target = name.replace(".", "_")
        while hasattr(traced, target):
            target += "_"
        if isinstance(tensor, torch.nn.Parameter):
            traced.register_parameter(target, tensor)
        else:
            traced.register_buffer(target, tensor)
        with traced.graph.inserting_before(node):
            attribute = traced.graph.get_attr(target)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        traced.graph.erase_node(node)


def _readable(name: str) -> str:
    """`l_self_modules_norm1_modules_linear_parameters_weight_` -> `norm1_linear_weight`."""
    name = re.sub(r"^l_(self_|kwargs_|args_)?(dict_)?", "", name)
    name = re.sub(r"(^|_)(modules|parameters|buffers)_", r"\1", name)
    return name.strip("_") or "input"
