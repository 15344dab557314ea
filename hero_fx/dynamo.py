"""Private APIs of Dynamo and Inductor that hero_fx needs, each wrapped in one place (torch 2.11 to 2.15)."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import fx
from torch._dynamo.source import LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import get_metrics_context
from torch._guards import CompileContext, TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from hero_fx.passes.compat import argument_name, no_autocast

__all__ = ["Compiled"]

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
T = TypeVar("T")


def is_control_flow(error: Exception) -> bool:
    """Whether an error is how Dynamo starts a trace anew, or leaves a function alone, and no failure."""
    return isinstance(error, (torch._dynamo.exc.RestartAnalysis, torch._dynamo.exc.SkipFrame))


def without_autocast(run: Compiled) -> Compiled:
    """`run` with autocast off, where it is on now: Dynamo sees to it that it then is at every call."""
    if not torch._C._is_any_autocast_enabled():
        return run

    def call(*inputs: Any) -> Any:
        with no_autocast():
            return run(*inputs)

    return call


def specialize(gm: fx.GraphModule) -> bool:
    """Turns every symbolic size and number of a Dynamo graph into a guard on its present value; true if there was one.

    Token counts are baked into a rewritten graph, so another resolution must compile again: these guards make Dynamo
    do so, and each compiled resolution owns its state. With `dynamic=True` the floats of a model (epsilons, scales) are
    inputs too, read by `item`; they become constants in `gm`.
    """
    found = False
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        symbols = [value] if isinstance(value, torch.SymInt) else []
        if isinstance(value, torch.Tensor):
            symbols = [s for s in (*value.shape, *value.stride()) if isinstance(s, torch.SymInt)]
        for symbol in symbols:
            int(symbol)
            found = True
        for user in [user for user in node.users if user.op == "call_method" and user.target == "item"]:
            number = user.meta.get("example_value")
            if _is_wrapped_number(node) and isinstance(number, torch.SymFloat):
                user.replace_all_uses_with(float(number))
                gm.graph.erase_node(user)
                found = True
    return found


def _is_wrapped_number(node: fx.Node) -> bool:
    """True for a graph input that Dynamo made of a Python number."""
    return bool(getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False))


def dynamic_marks(gm: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """The axes of each input that `torch._dynamo.mark_dynamic` was called for: Dynamo allows no guard on their sizes."""
    marks: dict[str, tuple[int, ...]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        example = getattr(node.meta.get("grapharg"), "example", None)
        axes = getattr(example, "_dynamo_dynamic_indices", None)
        if axes and not getattr(torch._dynamo.config, "allow_ignore_mark_dynamic", False):
            marks[argument_name(node)] = tuple(sorted(axes))
    return marks


def last_recompile() -> int | None:
    """Dynamo's limit of compiles of one function, if the one going on is the last that it allows."""
    limit = torch._dynamo.config.recompile_limit
    current = CompileContext.current_compile_id()
    number = getattr(current, "frame_compile_id", None)
    return limit if number is not None and number + 1 >= limit else None


def recompile_reason() -> str | None:
    """Why Dynamo compiles the present frame again: the guard that failed; None at a first compile (seen in 2.13)."""
    metrics = getattr(get_metrics_context(), "_metrics", {})
    reason = metrics.get("recompile_reason")
    return None if reason is None else str(reason).strip().splitlines()[0]


def enters_dynamo(frame: FrameType) -> bool:
    """True for the function that `torch.compile` puts in the place of a callable (2.9 and later)."""
    return frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame"


def frame_module() -> torch.nn.Module | None:
    """The module whose forward Dynamo is compiling right now, if the frame has one."""
    frame = _root_frame()
    if frame is None:
        return None
    values: Mapping[str, Any] = frame.f_locals
    candidates = [values.get("self"), *values.values()]
    return next((v for v in candidates if isinstance(v, torch.nn.Module)), None)


def frame_call() -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the call that Dynamo is compiling right now, positional ones and named ones, with its `self`."""
    frame = _root_frame()
    if frame is None:
        return None
    values: Mapping[str, Any] = frame.f_locals
    arguments = inspect.getargs(frame.f_code)  # named ones of either kind, then *args, then **kwargs
    positional = frame.f_code.co_argcount if arguments.varargs else frame.f_code.co_posonlyargcount
    args = tuple(values[name] for name in arguments.args[:positional])
    kwargs = {name: values[name] for name in arguments.args[positional:]}
    more, named = values.get(arguments.varargs or "", ()), values.get(arguments.varkw or "", {})
    return (*args, *more), {**kwargs, **named}


def traced_files() -> frozenset[str]:
    """The source files of all functions that the present trace went through."""
    return frozenset(code.co_filename for code in TracingContext.get_traced_code() or ())


def frame_module_name() -> str:
    """The Python module, such as `diffusers.hooks.hooks`, whose code Dynamo is compiling right now; empty if none."""
    frame = _root_frame()
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def frame_resumes_after_break() -> bool:
    """True if Dynamo is compiling the rest of a function after a graph break."""
    frame = _root_frame()
    return frame is not None and frame.f_code.co_name.startswith("torch_dynamo_resume_in")


def graph_break_reason(gm: fx.GraphModule) -> str | None:
    """Why Dynamo ended this graph early, or None if it holds the frame to its return."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return None
    return str(reason.reason)


def _root_frame() -> Any:
    try:
        return InstructionTranslator.current_tx().output.root_tx
    except AttributeError:  # not called from Dynamo
        return None


def copy_dynamo_marks(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Carries over what AOTAutograd reads from a Dynamo graph: which inputs have a fixed address.

    Further placeholders of `target` (feature state, marked `meta["static_address"]`) are marked as fixed too, so that
    CUDA graphs neither copy the weights nor refuse the mutated state. So are tensors that `target` and its subgraphs hold
    as attributes: AOTAutograd lifts them to inputs, and asks for the source of each.
    """
    compile_id = source.meta.get("dynamo_compile_id")
    if compile_id is None or not hasattr(source, "_param_name_to_source"):
        return
    target.meta["dynamo_compile_id"] = compile_id
    attributes = (*target.named_parameters(remove_duplicate=False), *target.named_buffers(remove_duplicate=False))
    # These sources name nothing that a guard could look up: such guards stay in the tracing context of the step graph.
    sources = {name: LocalSource(f"hero_fx_{name}") for name, _ in attributes}
    target._param_name_to_source = sources  # type: ignore[assignment]
    old = source.graph.find_nodes(op="placeholder")
    new = target.graph.find_nodes(op="placeholder")
    for node in new:
        node._dynamo_source = None
        if node.meta.get("static_address"):
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    for before, after in zip(old, new, strict=False):
        after._dynamo_source = getattr(before, "_dynamo_source", None)
        if "tensor_dict" in before.meta:
            after.meta["tensor_dict"] = before.meta["tensor_dict"]


def is_static_address(node: fx.Node) -> bool:
    """True if AOTAutograd will treat this graph input as one whose address never changes."""
    return bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))


@contextmanager
def _own_tracing_context(mode: FakeTensorMode) -> Iterator[None]:
    with tracing(TracingContext(mode)):
        yield


def inductor(
    mode: str | None, options: Mapping[str, Any] | None, dynamic: bool | None = None
) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """Inductor with a mode and options, as `torch.compile` calls it (the same class from 2.11 to 2.15)."""
    return torch._TorchCompileInductorWrapper(mode, dict(options or {}), dynamic)


def backend_named(backend: str | Callable[..., Any]) -> Callable[..., Compiled]:
    """The backend that `torch.compile(backend=...)` would take."""
    return torch._dynamo.lookup_backend(backend)


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    mode: FakeTensorMode,
    *,
    compile_mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Inductor's inference compilation of `gm` for fake `inputs` of `mode`; takes the same inputs, real, in order."""

    def compiled(more: Mapping[str, Any]) -> Compiled:
        with _own_tracing_context(mode), torch.no_grad():
            return inductor(compile_mode, {**(options or {}), **more}, dynamic=False)(gm, list(inputs))

    return around_fusion_defect(compiled)


def around_fusion_defect(compiled: Callable[[Mapping[str, Any]], T]) -> T:
    """What `compiled` gives with no further options of Inductor, or else with those that go around its defect."""
    try:
        return compiled({})
    except Exception as error:
        if not _is_fusion_defect(error):
            raise
        log.warning("Inductor failed to fuse loops of a step (%s), which is then compiled without fusion", error)
        return compiled({"max_fusion_size": 1})


def _is_fusion_defect(error: Exception) -> bool:
    """Whether Inductor's CPU code tripped over its own fusion of outer loops (seen on 2.13).

    A buffer that one step of the loops writes, and before whose reader another may not write (the change of a feature,
    computed from the state that the new feature then overwrites), is looked up in that other step, where it is not read.
    """
    return type(error).__name__ == "InductorError" and re.search(r"KeyError: 'buf\d+'", str(error)) is not None


def compile_with_aot_eager(gm: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> Compiled:
    """AOTAutograd without Inductor (`backend="aot_eager"`)."""
    from torch._dynamo.backends.debugging import aot_eager

    with _own_tracing_context(mode), torch.no_grad():
        return aot_eager(gm, list(inputs))


def backend_of(model: object, kind: type) -> Any:
    """The backend object of class `kind` that `torch.compile` was called with to make `model`, or None.

    `torch.compile(module)` keeps it in the module's `dynamo_ctx`, `torch.compile(function)` in the closure of what it
    returns, and `module.compile()` in that of `_compiled_call_impl` (2.11 to 2.15).
    """
    own = getattr(model, "backend", None)
    if isinstance(own, kind):  # what `hero_fx.load` returns has it
        return own
    callback = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    wrapper: Any = getattr(model, "_compiled_call_impl", None) or model
    if callback is None and getattr(wrapper, "__closure__", None):
        cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__, strict=True))
        callback = cells["callback"].cell_contents if "callback" in cells else None
    for _ in range(16):
        if callback is None or isinstance(callback, kind):
            return callback
        callback = getattr(callback, "_torchdynamo_orig_backend", None) or getattr(callback, "compiler_fn", None)
    return None


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` was called with to make `model`; `model` itself if it made none of it."""
    return getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None) or model


def unlimited_tracing() -> AbstractContextManager[None]:
    """Dynamo without its limit of compiles per function, and without hiding errors: for tracing that leaves no code."""
    return torch._dynamo.config.patch(  # type: ignore[no-any-return]
        recompile_limit=2**30, accumulated_recompile_limit=2**30, suppress_errors=False
    )


def forget_code(model: torch.nn.Module) -> None:
    """Drops what Dynamo has compiled of a module's forward, so that it does not count towards the recompile limit.

    `reset_code` is what `torch._dynamo.reset_code` calls; the same from 2.11 to 2.15.
    """
    code = getattr(type(model).forward, "__code__", None)
    if code is not None:
        torch._dynamo.reset_code(code)  # type: ignore[attr-defined]
