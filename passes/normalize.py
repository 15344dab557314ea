"""One vocabulary for every model: a Dynamo graph becomes a flat, functional, pre-dispatch ATen graph.

`normalize` retraces Dynamo's graph under fake tensors. Pre-dispatch tracing keeps `aten.linear`, `aten.layer_norm` and
`aten.scaled_dot_product_attention` whole, and keeps which module a node came from (`nn_module_stack`), which names
layers for people. Two passes then make the graph easy to reason about: `Functionalize` and `DropIdentities`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from hero_fx import _compat

from .emit import Emitter, drop_dead_code, value_of

__all__ = ["DropIdentities", "Functionalize", "normalize"]

aten = torch.ops.aten


class _WithModuleNames(fx.Interpreter):
    """Runs a graph so that each traced node inherits the meta of the node that made it."""

    def run_node(self, n: fx.Node) -> Any:
        with fx.traceback.set_current_meta(n):
            return super().run_node(n)


def normalize(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The pre-dispatch ATen graph of a Dynamo graph, with the same inputs in the same order.

    Args:
        gm: the graph Dynamo gave to the backend.
        inputs: its example inputs, real or fake; symbolic ints are taken at their present value.

    Every node of the result has a fake tensor in `meta["val"]`, all of one fake mode, with static sizes.
    """
    mode = _compat.new_fake_mode()
    fakes = [_compat.to_fake(mode, value) for value in inputs]
    with mode, torch.no_grad(), fx.traceback.preserve_node_meta():
        traced = make_fx(_WithModuleNames(gm).run, pre_dispatch=True)(*fakes)
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), traced.graph.find_nodes(op="placeholder"), strict=True):
        new._rename(_readable(old.name))
        new.target = new.name
        new.meta["argument"] = _compat.argument_name(old)
        new.meta["model_input"] = _compat.is_model_input(old)
    traced.recompile()
    return traced


def _readable(name: str) -> str:
    """`l_self_modules_norm1_modules_linear_parameters_weight_` -> `norm1_linear_weight`."""
    name = re.sub(r"^l_(self_|kwargs_|args_)?", "", name)
    name = re.sub(r"(^|_)(modules|parameters|buffers)_", r"\1", name)
    return name.strip("_") or "input"


def _is_in_place(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and node.target.namespace == "aten"
    )


def _functional_twin(op: torch._ops.OpOverload) -> Any:
    """`aten.mul_.Tensor` -> `aten.mul.Tensor`."""
    packet = getattr(aten, op._schema.name.removeprefix("aten::").removesuffix("_"))
    return getattr(packet, op._overloadname)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _is_view(node: fx.Node) -> bool:
    """True if the node's value shares memory with its first argument."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node) or _is_in_place(node):
        return False
    storage = _storage(node)
    return storage is not None and storage == _storage(node.args[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Functionalize:
    """Replaces in-place ATen ops by functional ones.

    Before (how rotary embeddings land in the image part of the queries)::

        part = aten.slice.Tensor(query, 2, 9, 129)
        copy_ = aten.copy_.default(part, rotated)
        out = aten.scaled_dot_product_attention.default(query, ...)

    After::

        query_1 = aten.slice_scatter.default(query, rotated, 2, 9, 129)
        out = aten.scaled_dot_product_attention.default(query_1, ...)

    Legal because the written tensor is a temporary of the graph, or a chain of views of one: later reads of it, and of
    other views of it, are redirected to the functional result; no one outside the graph can see the difference.
    A write to a graph input (or through a view that has no scatter) is left alone.
    """

    name: str = "functionalize"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter = Emitter(gm)
        sites = 0
        for node in list(gm.graph.nodes):
            if not _is_in_place(node):
                continue
            written = node.args[0]
            assert isinstance(written, fx.Node)
            chain = _views_down_to_base(written)
            base = chain[-1].args[0] if chain else written
            if not isinstance(base, fx.Node) or not _owns_its_memory(base):
                continue
            with emitter.before(node):
                value = self._value(emitter, node, written)
                new_base = value
                for view in chain:
                    scattered = _scatter(emitter, view, new_base)
                    if scattered is None:
                        break
                    new_base = scattered
                else:
                    self._redirect(gm, emitter, node, base, new_base, written, value)
                    sites += 1
        if sites:
            drop_dead_code(gm.graph)
        return sites

    @staticmethod
    def _value(emitter: Emitter, node: fx.Node, written: fx.Node) -> fx.Node:
        """What the written view holds after the in-place op."""
        if node.target is aten.copy_.default:
            source = node.args[1]
            assert isinstance(source, fx.Node)
            want, have = value_of(written), value_of(source)
            if have.dtype != want.dtype:
                source = emitter.call(aten.to.dtype, source, want.dtype)
            if have.shape != want.shape:
                source = emitter.call(aten.expand.default, source, list(want.shape))
            return source
        if node.target is aten.detach_.default:
            return written
        return emitter.call(_functional_twin(node.target), *node.args, **node.kwargs)  # type: ignore[arg-type]

    @staticmethod
    def _redirect(
        gm: fx.GraphModule,
        emitter: Emitter,
        node: fx.Node,
        base: fx.Node,
        new_base: fx.Node,
        written: fx.Node,
        value: fx.Node,
    ) -> None:
        """Later users of the base, and of every view of it, see the new value."""
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        here = order[node]
        fresh: dict[fx.Node, fx.Node] = {base: new_base, written: value}
        # Views made before the write alias what was written: replay them on the new base for readers behind it.
        aliases = [base]
        for alias in aliases:
            for user in list(alias.users):
                if _is_view(user) and user.args[0] is alias and order.get(user, here) < here:
                    aliases.append(user)
                    if user not in fresh and any(order.get(u, -1) > here for u in user.users):
                        source = user.args[0]
                        assert isinstance(source, fx.Node)
                        if source in fresh:
                            fresh[user] = emitter.call(user.target, fresh[source], *user.args[1:], **user.kwargs)
        for old, new in fresh.items():
            old.replace_all_uses_with(new, delete_user_cb=lambda user: order.get(user, -1) > here)
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
        # Views behind the write now alias the new base: their fake values must say so too.
        storage = _storage(base)
        for later in list(gm.graph.nodes)[here:]:
            values = later.meta.get("val")
            values = values if isinstance(values, (tuple, list)) else (values,)
            if later.op == "call_function" and any(
                isinstance(v, torch.Tensor) and v.untyped_storage()._cdata == storage for v in values
            ):
                emitter.revalue(later)


def _owns_its_memory(node: fx.Node) -> bool:
    """True for a temporary that aliases none of what it was computed from, as far as fake storages show."""
    storage = _storage(node)
    if node.op != "call_function" or storage is None or node.target is operator.getitem:
        return False
    return all(_storage(source) != storage for source in node.all_input_nodes)


def _views_down_to_base(node: fx.Node) -> list[fx.Node]:
    """The views from `node` down to the tensor they alias, nearest first."""
    chain = []
    while _is_view(node):
        chain.append(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return chain


def _scatter(emitter: Emitter, view: fx.Node, value: fx.Node) -> fx.Node | None:
    """The tensor that `view` views, with `value` in place of what the view shows; None if there is no such op."""
    base, *rest = view.args
    assert isinstance(base, fx.Node)
    match view.target:
        case aten.slice.Tensor:
            return emitter.call(aten.slice_scatter.default, base, value, *rest)
        case aten.narrow.default:
            dim, start, length = rest
            return emitter.call(aten.slice_scatter.default, base, value, dim, start, start + length)  # type: ignore[operator]
        case aten.select.int:
            return emitter.call(aten.select_scatter.default, base, value, *rest)
        case aten.transpose.int:
            return emitter.call(aten.transpose.int, value, *rest)
    if value_of(view).numel() == value_of(base).numel() and view.target in _RESHAPES:
        return emitter.call(aten.reshape.default, value, list(value_of(base).shape))
    return value if value_of(view).shape == value_of(base).shape and _returns_its_input(view) else None


_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DropIdentities:
    """Removes ops that return their input: dropout outside training, casts to the dtype the tensor has, `detach`.

    Before::

        dropout = aten.dropout.default(linear, 0.0, False)
        to = aten.to.dtype(dropout, torch.float32)  # linear is float32
        add = aten.add.Tensor(x, to)

    After::

        add = aten.add.Tensor(x, linear)

    Legal because each removed op returns its argument (or an alias of it) bit for bit, and after `Functionalize` no
    node writes to an alias. An op whose result is a graph output stays: outputs keep their identity.
    """

    name: str = "drop_identities"

    def apply(self, gm: fx.GraphModule) -> int:
        sites = 0
        returned = set(gm.graph.output_node().all_input_nodes)
        written = {n.args[0] for n in gm.graph.nodes if _is_in_place(n)}
        for node in list(gm.graph.nodes):
            if node in returned or node in written or not _returns_its_input(node):
                continue
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            sites += 1
        return sites


def _returns_its_input(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = value_of(node.args[0]), value_of(node)
    match node.target:
        case aten.dropout.default:
            return not node.args[2] or node.args[1] == 0.0
        case aten.detach.default | aten.alias.default:
            return True
        case aten.to.dtype | aten.to.dtype_layout | aten.to.device | aten.to.other | aten.type_as.default:
            copies = node.kwargs.get("copy", False) or node.kwargs.get("memory_format") is not None
            same = before.dtype == after.dtype and before.device == after.device and before.stride() == after.stride()
            return same and not copies
        case aten.contiguous.default:
            return bool(before.is_contiguous()) and len(node.args) == 1 and not node.kwargs
    return False
