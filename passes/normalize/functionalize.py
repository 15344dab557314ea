"""In-place ops made functional, so that every later pass may take a node's value for what it was computed to be.

Why not PyTorch's `aot_export_module(pre_dispatch=True)`? It too gives functional graphs that keep `linear`, `layer_norm` and
attention whole. Tried on the zoo with torch 2.13, it gave the same outputs, bit for bit, with inputs in order and module names
kept, on 84 of the 86 models that one Dynamo graph was captured of. But

* it fails on flex attention (the other two), and nothing in that process compiles afterwards;
* what a model writes to its inputs or buffers becomes further outputs, where this pass leaves the write in place;
* it traces twice: 2.3 times the time of `normalize`, to which this pass adds less than one hundredth;
* it replaces the model's own ops: `reshape`, `flatten` and `unflatten` by `view` with all sizes baked in, `chunk` by `split`,
  `contiguous` by `clone`, and it adds a check of metadata at every cast.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from hero_fx.passes.compat import storage_of
from hero_fx.passes.emit import Emitter, drop_dead_code, value_of
from hero_fx.passes.ops import (
    RESHAPES,
    SPLITS,
    UNIT_AXES,
    first_input,
    int_argument,
    ints_argument,
    is_in_place,
    out_of_place,
)

__all__ = ["Functionalize", "memory_of"]

aten = torch.ops.aten

# Views whose source `_scatter` knows how to write: of a part, of one of several parts, of the whole in another order.
_PARTS = {aten.slice.Tensor, aten.narrow.default, aten.select.int, operator.getitem}
_CUTS = SPLITS | {aten.unbind.int}
_MOVES = {aten.transpose.int, aten.permute.default}


def memory_of(node: fx.Node) -> int | None:
    """The memory of a node's value, or of the first of its values."""
    value = node.meta.get("val")
    return storage_of(value[0] if isinstance(value, (tuple, list)) and value else value)


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
        nodes = list(gm.graph.nodes)
        sharing: dict[int | None, list[fx.Node]] = defaultdict(list)  # the calls whose values lie in one memory
        for node in nodes:
            if node.op == "call_function":
                sharing[memory_of(node)].append(node)
        for node in nodes:
            if not is_in_place(node) or out_of_place(node.target) is None:
                continue
            written: Any = node.args[0]
            arguments: Any = node.kwargs
            chain, base = _views_down_to_base(written)
            reshapes = torch.Tag.inplace_view in node.target.tags
            if not _owns_its_memory(base) or not (reshapes or all(map(_has_scatter, chain))):
                continue
            with emitter.before(node):
                if reshapes:  # unsqueeze_, detach_: no value changes, so no other view does
                    base, value = written, emitter.call(out_of_place(node.target), *node.args, **arguments)
                else:
                    value = _written_value(emitter, node, written, chain)
                    for view in chain:
                        value = _scatter(emitter, view, value)
                self._redirect(gm, emitter, node, base, value, sharing)
            sites += 1
        if sites:
            drop_dead_code(gm.graph)
        return sites

    @staticmethod
    def _redirect(
        gm: fx.GraphModule,
        emitter: Emitter,
        node: fx.Node,
        base: fx.Node,
        new_base: fx.Node,
        sharing: dict[int | None, list[fx.Node]],
    ) -> None:
        """Later users of the base, and of every view of it, see the new value."""
        fresh = {base: new_base}

        def again(alias: fx.Node) -> fx.Node:
            """What `alias` is to the base, of the new base."""
            if alias not in fresh:
                fresh[alias] = again(first_input(alias))
                if not is_in_place(alias):
                    arguments: Any = alias.kwargs
                    fresh[alias] = emitter.call(alias.target, fresh[alias], *alias.args[1:], **arguments)
            return fresh[alias]

        aliases = [base]
        for alias in aliases:
            for user in alias.users:
                before = not user > node and user is not new_base
                if before and user.args[0] is alias and (_is_view(user) or is_in_place(user)):
                    aliases.append(user)
        for alias in aliases:
            if any(user > node for user in alias.users):
                alias.replace_all_uses_with(again(alias), delete_user_cb=lambda user: user > node)
        later = sorted(n for n in sharing.pop(memory_of(base), ()) if n > node)
        gm.graph.erase_node(node)
        # Views behind the write now alias the new base: their fake values must say so too.
        for view in later:
            emitter.revalue(view)
            sharing[memory_of(view)].append(view)


def _is_view(node: fx.Node) -> bool:
    """True if the node's value shares memory with its first argument."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node) or is_in_place(node):
        return False
    if node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2]):
        return True  # a fake one has memory of its own, a real one returns its input
    storage = memory_of(node)
    return storage is not None and storage == memory_of(node.args[0])


def _written_value(emitter: Emitter, node: fx.Node, written: fx.Node, chain: list[fx.Node]) -> fx.Node:
    """What the written view holds after the in-place op, in its own shape and dtype."""
    want = value_of(written)
    if node.target is aten.copy_.default:
        source = node.args[1]
        assert isinstance(source, fx.Node)
        if not any(view.target in _PARTS for view in chain):
            # No scatter copies the source: its memory and layout must not become those of the written tensor.
            return emitter.call(aten.copy.default, written, source)
        if value_of(source).dtype != want.dtype:
            source = emitter.call(aten.to.dtype, source, want.dtype)
        if value_of(source).shape != want.shape:
            source = emitter.call(aten.expand.default, source, list(want.shape))
        return source
    arguments: Any = node.kwargs
    value = emitter.call(out_of_place(node.target), *node.args, **arguments)
    # In place, `bf16.mul_(f32)` stays bf16.
    return value if value_of(value).dtype == want.dtype else emitter.call(aten.to.dtype, value, want.dtype)


def _owns_its_memory(node: fx.Node) -> bool:
    """True for a temporary that aliases none of what it was computed from, as far as fake storages show."""
    storage = memory_of(node)
    if node.op != "call_function" or storage is None:
        return False
    return all(memory_of(source) != storage for source in node.all_input_nodes)


def _views_down_to_base(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The views from `node` down to the tensor they alias, nearest first, and that tensor."""
    chain = []
    while _is_view(node):
        chain.append(node)
        node = _viewed(node)
    return chain, node


def _viewed(view: fx.Node) -> fx.Node:
    """The tensor that a view is of; that of one part of a split is the whole."""
    source = first_input(view)
    return first_input(source) if view.target is operator.getitem else source


def _has_scatter(view: fx.Node) -> bool:
    if view.target is operator.getitem:
        return first_input(view).target in _CUTS
    return view.target in _PARTS | _MOVES | RESHAPES | UNIT_AXES or _shows_all(view)


def _shows_all(view: fx.Node) -> bool:
    """True for a view that is its source again (`detach`, a cast to the same dtype)."""
    shown, whole = value_of(view), value_of(_viewed(view))
    layout = [(v.dtype, v.shape, v.stride(), v.storage_offset()) for v in (shown, whole)]
    return layout[0] == layout[1]


def _scatter(emitter: Emitter, view: fx.Node, value: fx.Node) -> fx.Node:
    """The tensor that `view` views, with `value` in place of what the view shows."""
    base, rest = _viewed(view), view.args[1:]
    kwargs: Any = view.kwargs
    match view.target:
        case aten.slice.Tensor:
            return emitter.call(aten.slice_scatter.default, base, value, *rest, **kwargs)
        case aten.narrow.default:
            start = int_argument(view, "start")
            stop = start + int_argument(view, "length")
            return emitter.call(aten.slice_scatter.default, base, value, int_argument(view, "dim"), start, stop)
        case aten.select.int:
            return emitter.call(aten.select_scatter.default, base, value, *rest, **kwargs)
        case operator.getitem:
            return _scatter_part(emitter, view, base, value)
        case aten.transpose.int:
            return emitter.call(aten.transpose.int, value, *rest, **kwargs)
        case aten.permute.default:
            rank = value_of(base).dim()
            order = [d % rank for d in ints_argument(view, "dims")]
            return emitter.call(aten.permute.default, value, [order.index(i) for i in range(rank)])
    if view.target in RESHAPES | UNIT_AXES:
        return emitter.call(aten.reshape.default, value, list(value_of(base).shape))
    return value


def _scatter_part(emitter: Emitter, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    """The base of a split with `value` in place of the part that `view` picks."""
    split, number = view.args
    assert isinstance(split, fx.Node)
    assert isinstance(number, int)
    parts = value_of(split)
    dim = int_argument(split, "dim")
    if split.target is aten.unbind.int:
        return emitter.call(aten.select_scatter.default, base, value, dim, number % len(parts))
    stops = list(accumulate(part.shape[dim] for part in parts))
    return emitter.call(
        aten.slice_scatter.default, base, value, dim, stops[number] - parts[number].shape[dim], stops[number]
    )
