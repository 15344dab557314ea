"""Autocast made explicit: casts where autocast makes them, and no region left in the graph.

An op in an autocast region gives something else than the same op outside of it, and passes copy and move ops. Once every
cast is a node of its own, an op means the same wherever it stands, and equal ops are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from hero_fx.passes import compat
from hero_fx.passes.compat import OpOverload, TorchDispatchMode, tree_flatten, tree_map, tree_unflatten
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.ops import first_input

__all__ = ["ResolveAutocast"]

aten = torch.ops.aten
Casts = dict[int, torch.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolveAutocast:
    """Replaces autocast regions by the casts that they make.

    Before (x and weight are float32)::

        _enter_autocast = torch.amp.autocast_mode._enter_autocast("cpu", bf16, True, None)
        linear = aten.linear.default(x, weight)
        _exit_autocast = torch.amp.autocast_mode._exit_autocast(_enter_autocast)

    After::

        to = aten.to.dtype(x, bf16)
        to_1 = aten.to.dtype(weight, bf16)
        linear = aten.linear.default(to, to_1)

    Legal because it is what autocast does, bit for bit. Each op is run on fake tensors with its region on, and what
    comes out beneath autocast is recorded. Where that is casts of the op's inputs and then the op itself, which a second
    record without autocast confirms, the graph gets just that. Where it is anything else (an op made of smaller ones, of
    which some cast) the graph gets the recorded ops.

    Raises:
        ValueError: the body of a higher-order op (as flex attention has it) holds ops that autocast.
    """

    around: tuple[tuple[str, torch.dtype], ...] = ()
    """(device type, dtype) of the autocast that is on where the model is called."""
    name: str = "resolve_autocast"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, sites = Emitter(gm), 0
        known: dict[str, Casts | None] = {}
        with compat.autocast(self.around), _Regions() as regions:
            for node in list(gm.graph.nodes):
                if regions.passes(node):
                    if node.target is compat.exit_autocast:
                        opened = first_input(node)
                        gm.graph.erase_node(node)
                        gm.graph.erase_node(opened)
                        sites += 1
                elif node.op == "call_function" and (self.around or regions.opened):
                    sites += _resolve(emitter, node, known)
        return sites


class _Regions:
    """The autocast regions around the place in a graph that a walk is at; they are on."""

    def __init__(self) -> None:
        self.opened: dict[fx.Node, Any] = {}

    def __enter__(self) -> _Regions:
        return self

    def __exit__(self, *raised: object) -> None:
        for region in reversed(self.opened.values()):
            compat.exit_autocast(region)

    def passes(self, node: fx.Node) -> bool:
        """Whether a node opens or closes a region, which is done."""
        if node.target is compat.enter_autocast:
            self.opened[node] = compat.enter_autocast(*node.args)
            return True
        if node.target is compat.exit_autocast:
            compat.exit_autocast(self.opened.pop(first_input(node)))
            return True
        return False


def _resolve(emitter: Emitter, node: fx.Node, known: dict[str, Casts | None]) -> bool:
    """Makes explicit what autocast does to one op; whether that is anything."""
    if not isinstance(node.target, OpOverload):
        _refuse_body(emitter.gm, node)
        return False
    call = _Call(node, emitter.mode)
    devices = call.devices()
    if not devices or not compat.may_autocast(node.target):
        return False
    key = f"{call} {[compat.autocast_dtype(device) for device in devices]}"
    if key not in known:
        known[key] = _casts_of(call)
    casts = known[key]
    if casts is None:
        _write_out(emitter, node, call)
    elif casts:
        places = iter(range(len(call.values)))
        with emitter.before(node), compat.no_autocast():
            leaves = [
                _cast(emitter, leaf, casts.get(next(places))) if isinstance(leaf, fx.Node) else leaf
                for leaf in call.leaves
            ]
        node.args, node.kwargs = tree_unflatten(leaves, call.structure)
    return casts is None or bool(casts)


def _cast(emitter: Emitter, source: fx.Node, dtype: torch.dtype | None) -> fx.Node:
    return source if dtype is None else emitter.call(aten.to.dtype, source, dtype)


def _refuse_body(gm: fx.GraphModule, node: fx.Node) -> None:
    """Ops in the body of a higher-order op stay as they are, so autocast must not mean anything to them."""
    for source in node.all_input_nodes:
        body = getattr(gm, str(source.target), None) if source.op == "get_attr" else None
        for inner in body.graph.nodes if isinstance(body, fx.GraphModule) else ():
            if isinstance(inner.target, OpOverload) and compat.has_autocast(inner.target):
                raise ValueError(
                    f"{inner.target} in the body of {node.target} runs under autocast, whose casts are made explicit outside "
                    "of such bodies only; leave autocast around it (torch.autocast(device_type, enabled=False)), or the cast"
                )


class _Call:
    """The call of an op, to be run on fake tensors like its inputs, each with memory of its own."""

    def __init__(self, node: fx.Node, mode: compat.FakeTensorMode) -> None:
        self.op: Any = node.target
        self.leaves, self.structure = tree_flatten((node.args, dict(node.kwargs)))
        self.mode = mode
        self.values = [value_of(leaf) for leaf in self.leaves if isinstance(leaf, fx.Node)]

    def __str__(self) -> str:
        shown = [_shown(value_of(x)) if isinstance(x, fx.Node) else repr(x) for x in self.leaves]
        return f"{self.op} {self.structure} {shown}"

    def devices(self) -> list[str]:
        """The device types of its floating-point inputs."""
        floats = [v for v in self.values if isinstance(v, torch.Tensor) and v.is_floating_point()]
        return sorted({value.device.type for value in floats})

    def inputs(self, casts: Mapping[int, torch.dtype]) -> list[Any]:
        """Fresh inputs, some of other dtypes."""
        with self.mode, torch.no_grad(), compat.no_autocast():
            return [
                torch.empty_like(value, dtype=casts.get(place)) if isinstance(value, torch.Tensor) else value
                for place, value in enumerate(self.values)
            ]

    def run(self, *inputs: Any) -> Any:
        """The op on `inputs`."""
        values = iter(inputs)
        leaves = [next(values) if isinstance(leaf, fx.Node) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return self.op(*args, **kwargs)

    def record(self, casts: Mapping[int, torch.dtype]) -> tuple[Casts, list[str]]:
        """The casts of inputs that it begins with beneath autocast, and the calls it then comes to."""
        inputs = self.inputs(casts)
        with self.mode, torch.no_grad(), compat.unbound_sizes(self.mode), _Recorder(inputs) as recorder:
            self.run(*inputs)
        return recorder.casts, recorder.calls


class _Recorder(TorchDispatchMode):
    """Writes down the ops that run; tensors are named by where they come from."""

    def __init__(self, inputs: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.casts: Casts = {}
        self.calls: list[str] = []
        self._names: dict[int, str] = {}
        self._alive: list[Any] = []
        self._places = {id(value): place for place, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
        for key, place in self._places.items():
            self._names[key] = f"input {place}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions about a fake tensor's device
            return out
        self._alive += [args, kwargs, out]  # so that no two tensors ever have the same id
        place = self._places.get(id(args[0])) if args else None
        is_cast = func is aten._to_copy.default and kwargs == {"dtype": out.dtype}
        if is_cast and not self.calls and place is not None and place not in self.casts:
            self.casts[place] = out.dtype
            self._names[id(args[0])], self._names[id(out)] = f"input {place}, not cast", f"input {place}"
            return out
        called = tree_map(self._name, (args, kwargs or {}))
        results = tree_flatten(out)[0]
        for number, result in enumerate(results):
            self._names.setdefault(id(result), f"result {number} of call {len(self.calls)}")
        self.calls.append(f"{func}{called} -> {[_shown(result) for result in results]}")
        return out

    def _name(self, value: Any) -> Any:
        return self._names.get(id(value), _shown(value)) if isinstance(value, torch.Tensor) else value


def _shown(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)} {value.device}" if isinstance(value, torch.Tensor) else repr(value)


def _casts_of(call: _Call) -> Casts | None:
    """The casts of its inputs that come to the same as autocast; None if there are no such."""
    casts, calls = call.record({})
    if _plain(call, {}) == (casts, calls):
        return {}
    return casts if _plain(call, casts) == ({}, calls) else None


def _plain(call: _Call, casts: Casts) -> tuple[Casts, list[str]] | None:
    """What the op comes to without autocast, its inputs cast; None if it takes no inputs of such dtypes."""
    try:
        with compat.no_autocast():
            return call.record(casts)
    except (RuntimeError, TypeError, ValueError):
        return None


def _write_out(emitter: Emitter, node: fx.Node, call: _Call) -> None:
    """Puts the ops that a call comes to beneath autocast in its place."""
    with call.mode, torch.no_grad(), compat.unbound_sizes(call.mode):
        traced = make_fx(call.run)(*call.inputs({}))
    traced.graph.eliminate_dead_code()
    sources = [leaf for leaf in call.leaves if isinstance(leaf, fx.Node)]
    new: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True))
    with emitter.before(node):
        for inner in traced.graph.nodes:
            assert inner.op != "get_attr", "an op on tensors makes no constants"
            if inner.op == "call_function":
                new[inner] = emitter.graph.node_copy(inner, new.__getitem__)
                new[inner].meta |= {k: v for k, v in node.meta.items() if k != "val"}
    results: Any = fx.map_arg(traced.graph.output_node().args[0], new.__getitem__)
    if isinstance(results, fx.Node):
        # Views of the result share memory with its value, and passes tell views by that.
        results.meta["val"] = value_of(node)
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            part = results[user.args[1]]
            part.meta["val"] = value_of(user)
            user.replace_all_uses_with(part)
            emitter.graph.erase_node(user)
    emitter.graph.erase_node(node)
