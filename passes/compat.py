"""Private PyTorch APIs that the passes need, each wrapped or named here and nowhere else.

Tests run on torch 2.13; in 2.11.0 and 2.14.1 all names have the same paths (read). What differs is said in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._logging._internal import trace_structured
from torch._ops import HigherOrderOperator, OperatorBase, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._dtype_abbrs import dtype_abbrs
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)  # fmt: skip
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "DATA_DEPENDENT", "FUNCTIONAL_COLLECTIVES", "FakeTensor", "FakeTensorMode", "HigherOrderOperator", "OpOverload",
    "OpOverloadPacket", "OperatorBase", "TorchDispatchMode", "count_flops", "enter_autocast", "exit_autocast",
    "is_traceable_wrapper_subclass", "tree_flatten", "tree_map", "tree_unflatten", "treespec_dumps", "treespec_loads",
]  # fmt: skip


def schema_of(target: object) -> Any:
    """The schema of an op: its name, its arguments with their defaults, and what it writes to; None for what is no op."""
    return getattr(target, "_schema", None)


def short_name(dtype: torch.dtype) -> str:
    """`f32` for `torch.float32`; the name itself for a dtype that torch has no abbreviation for."""
    return dtype_abbrs.get(dtype) or str(dtype).removeprefix("torch.")


def storage_of(value: object) -> int | None:
    """Which memory a tensor lies in; None for what is no tensor, or has no memory to tell."""
    # Within a vmap (flex attention makes its block mask so) a tensor hides a batch.
    if not isinstance(value, torch.Tensor) or torch._C._functorch.is_batchedtensor(value):
        return None
    return int(value.untyped_storage()._cdata)


class _NoModules:
    """In place of what counts by module."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def count_flops() -> FlopCounterMode:
    """PyTorch's counter without its global hooks on modules: a compiled model that runs in another thread warns of them."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def rename(node: fx.Node, name: str) -> None:
    """Gives a node a name like this that no other node of its graph has."""
    node._rename(name)


def map_nesting(target: object) -> int | None:
    """1 for the call that opens a vmap in Dynamo's graph, -1 for the one that closes it, 0 for others of it, None else."""
    if getattr(target, "__module__", "") != "torch._functorch.predispatch":
        return None
    steps = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}
    return steps.get(getattr(target, "__name__", ""), 0)


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Hands an artifact to TORCH_TRACE / tlparse; `payload` is called only where something listens."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=payload,
        expect_trace_id=False,  # pipelines also run outside of torch.compile
    )


enter_autocast: Callable[..., Any] = _enter_autocast  # Dynamo's `with torch.autocast(...)`; the same from 2.11 to 2.15
exit_autocast: Callable[..., None] = _exit_autocast
FUNCTIONAL_COLLECTIVES: Any = torch.ops._c10d_functional  # what torch.distributed is in a graph
# Raised where a graph goes by the values of tensors.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def new_fake_mode() -> FakeTensorMode:
    """A fake mode with static shapes that lets real constants pass. Inductor's FX cache wants a shape environment."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module of a graph whose code is written when it is first run: Inductor reads the graph alone, and never asks for it."""
    return _LazyGraphModule(root, graph)


def write_code(gm: fx.GraphModule) -> None:
    """Writes a module's code, if it was not yet: threads that ran it for the first time together would write it at once."""
    _LazyGraphModule.force_recompile(gm)


def lazy_code() -> AbstractContextManager[None]:
    """Within it `make_fx` makes modules whose code is written when they are first run, as Dynamo's are."""
    return _use_lazy_graph_module(True)


def unbound_sizes(mode: FakeTensorMode) -> AbstractContextManager[None]:
    """Within it sizes that only values tell are made outside of any trace; the next one would take them for its outputs."""
    assert mode.shape_env is not None
    return mode.shape_env.ignore_fresh_unbacked_symbols()


def real_values() -> AbstractContextManager[Any]:
    """Within it a fake mode that is on is off: real tensors can be looked at."""
    return unset_fake_temporarily()


def to_fake(mode: FakeTensorMode, value: Any) -> Any:
    """`value` with real (or other-mode) tensors replaced by static fake ones of `mode`; symbolic ints become ints."""
    if isinstance(value, torch.SymInt):
        return int(value)
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, FakeTensor):
        if value.fake_mode is mode:
            return value
        size, stride = [int(s) for s in value.shape], [int(s) for s in value.stride()]
        with mode:
            return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
    return mode.from_tensor(value, static_shapes=True)


def no_autocast() -> AbstractContextManager[Any]:
    """Within it no op casts its inputs by autocast, on whatever device; regions opened within it work."""
    return torch._C._DisableAutocast()


@contextmanager
def autocast(regions: Sequence[tuple[str, torch.dtype]]) -> Iterator[None]:
    """Autocast for each (device type, dtype)."""
    with ExitStack() as stack:
        for device, dtype in regions:
            stack.enter_context(torch.autocast(device, dtype))
        yield


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on a type of device; None where it is off."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


_AUTOCAST_KEYS = tuple(key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith("Autocast"))


def has_autocast(op: OpOverload[..., Any]) -> bool:
    """Whether an op has a kernel of its own for autocast."""
    return any(map(op.has_kernel_for_dispatch_key, _AUTOCAST_KEYS))


def may_autocast(op: OpOverload[..., Any]) -> bool:
    """False for an op that does the same with autocast as without: it has no kernel for it, and is not made of other ops."""
    return has_autocast(op) or op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def argument_name(node: fx.Node) -> str:
    """The user's name of a Dynamo graph input: the last part of its source, `timestep` for `L['kwargs']['timestep']`."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(node, "_dynamo_source", None)
    while source is not None:
        for attribute in ("index", "member", "local_name"):
            value = getattr(source, attribute, None)
            if isinstance(value, str):
                return value
        source = getattr(source, "base", None)
    return node.name


def source_name(node: fx.Node) -> str:
    """Where a Dynamo graph input comes from, such as `L['kwargs']['timestep']`."""
    source = getattr(node.meta.get("grapharg"), "source", None) or getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", node.name)
    return str(name() if callable(name) else name)  # a method in some versions


def size_of(value: int | torch.SymInt) -> Any:
    """A size as an int, or as sympy's expression where it is symbolic."""
    expression = value.node.expr if isinstance(value, torch.SymInt) else value
    return int(expression) if getattr(expression, "is_number", True) else expression


def size_now(value: int | torch.SymInt) -> int:
    """A size as it is in the call that is traced; no guard keeps it."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


def copy_source(old: fx.Node | None, new: fx.Node) -> None:
    """A graph input gets the source (the argument or weight it is) that another has, or none."""
    new._dynamo_source = getattr(old, "_dynamo_source", None)


def copy_origin(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """A module gets what Dynamo notes on a graph's: where its weights come from, and why the graph ends."""
    for attribute in ("_param_name_to_source", "compile_subgraph_reason"):
        if hasattr(old, attribute):
            setattr(new, attribute, getattr(old, attribute))


def is_model_input(node: fx.Node) -> bool:
    """False for a parameter or buffer that Dynamo lifted to a graph input, true for what the caller passes."""
    if isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return False
    if (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"):
        return False
    source = getattr(node.meta.get("grapharg"), "source", None) or getattr(node, "_dynamo_source", None)
    while source is not None:
        if getattr(source, "member", None) in ("_parameters", "_buffers"):
            return False
        if "NNModule" in type(source).__name__:
            return False
        source = getattr(source, "base", None)
    return True


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists, dicts and what else registers with pytree (diffusers' outputs do)."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def leaf_names(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the leaves of arguments are: `latents`, `rotary[0]`, `options['scale']`."""
    paths, _ = tree_flatten_with_path(dict(arguments))
    return tuple(keystr(path[:1])[2:-2] + keystr(path[1:]) for path, _ in paths)


def with_tensors(value: Any, new: Mapping[int, torch.Tensor]) -> Any:
    """The same nest with the tensors of these ids replaced."""
    return tree_map(lambda leaf: new.get(id(leaf), leaf), value)


@contextmanager
def autocast_kept() -> Iterator[None]:
    """Leaves autocast as it was: a graph that raises between entering a region and leaving it stays in it."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    before = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    try:
        yield
    finally:
        for device, (enabled, dtype) in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


class StorageId:
    """Which memory a tensor lies in, held weakly: equal for tensors that share it, and for no others as long as this lives.

    The weak reference keeps the storage's record from being given to another one, not its memory.
    """

    __slots__ = ("_reference",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._reference = StorageWeakRef(tensor.untyped_storage())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorageId) and self._reference.cdata == other._reference.cdata

    def __hash__(self) -> int:
        return hash(self._reference.cdata)

    @property
    def alive(self) -> bool:
        """Whether someone still holds the memory."""
        return not self._reference.expired()
