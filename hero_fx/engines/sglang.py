"""The plugin for SGLang's diffusion runtime: `HERO_FX='{}' sglang serve --enable-torch-compile ...`.

SGLang compiles whole transformers with `torch.compile`; the plugin hands it hero_fx as the backend. Which request, which
branch of guidance and which step a call belongs to is taken from SGLang's own forward context.

Nothing of SGLang is imported until its plugin loader calls `activate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hero_fx
from hero_fx.runtime.calling import Calling, Session

from .settings import VARIABLE, EngineError, is_on, new_backend

__all__ = ["activate"]

_RUNTIME = "sglang.multimodal_gen.runtime"
_STAGE = f"{_RUNTIME}.pipelines_core.stages.denoising.DenoisingStage"
_COUNTERS = (".cnt", ".spectrum_cnt")
"""Attributes of SGLang's transformers that count calls for TeaCache and Spectrum. A guard on one recompiles at every step;
no graph that hero_fx accepts depends on them, since requests that use either are refused."""


def activate() -> None:
    """Registers the hooks, if `HERO_FX` is set. SGLang calls it in every process, before models are loaded."""
    if not is_on():
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    for target, hook in _hooks().items():
        HookRegistry.register(target, hook, HookType.AROUND)


def _hooks() -> dict[str, Callable[..., Any]]:
    return {
        f"{_RUNTIME}.utils.torch_compile.CompiledModuleRegistry.compile_once": _compile_once,
        f"{_STAGE}._maybe_torch_compile": _check_engine,
        f"{_STAGE}._predict_noise": _predict_noise,
        f"{_STAGE}.forward": _forward,
        f"{_RUNTIME}.distributed.cfg_policy.CFGBranch.configure_batch": _configure_batch,
    }


def _check_engine(original: Callable[..., None], stage: Any, module: object) -> None:
    """Before a transformer is compiled: refuses settings of the engine that would leave hero_fx out, or make it wrong."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry

    # SGLang only logs a hook whose target it does not find, and would go on without it.
    missing = sorted(_hooks().keys() - HookRegistry._patched)
    if missing:
        raise EngineError(
            f"this version of SGLang has no {missing[0]}, which hero_fx needs: use 0.5.23, or unset {VARIABLE}"
        )
    arguments = stage.server_args
    degree = max(arguments.sp_degree or 1, arguments.ulysses_degree or 1, arguments.ring_degree or 1)
    refused = {
        "--enable-torch-compile is not given": not arguments.enable_torch_compile,
        "--regional-compile compiles single layers, and HERO needs the whole transformer: leave it out": (
            arguments.regional_compile
        ),
        "breakable CUDA graphs replace torch.compile: add --enable-breakable-cuda-graph false": (
            arguments.enable_breakable_cuda_graph
        ),
        f"sequence parallelism is on (degree {degree}; SGLang takes it for GPUs that nothing else uses), and hero_fx is not "
        "tested with its exchanges: set --num-gpus 1, one server for each GPU (or see docs/operations.md, Several GPUs)": (
            degree > 1
        ),
        "Cache-DiT (SGLANG_CACHE_DIT_ENABLED) caches too: unset it": stage._cache_dit_requested(),
    }
    for why, holds in refused.items():
        if holds:
            raise EngineError(f"{VARIABLE} is set, but {why}. To serve without hero_fx, unset {VARIABLE}")
    original(stage, module)


def _compile_once(
    original: Callable[..., bool], registry: Any, module: Any, *, compile_kwargs: dict[str, object]
) -> bool:
    """`module.compile(...)` with hero_fx as the backend. Inductor's `mode` goes to the compiler behind it."""
    mode = compile_kwargs.get("mode")
    ours = {"backend": new_backend(str(mode) if mode else None), "options": {"guard_filter_fn": _guards}}
    kept = {name: value for name, value in compile_kwargs.items() if name != "mode"}
    return original(registry, module, compile_kwargs=kept | ours)


def _guards(entries: Sequence[Any]) -> list[bool]:
    return [not str(entry.name).endswith(_COUNTERS) for entry in entries]


def _configure_batch(original: Callable[..., None], branch: Any, batch: Any) -> None:
    """Notes the branch of guidance by its name: the context has only whether it is the negative one."""
    original(branch, batch)
    batch.extra["hero_fx_branch"] = branch.name


def _predict_noise(original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any) -> Any:
    """One call of the transformer, with the request, branch and step of the forward context."""
    from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context

    context = get_forward_context()
    with _calling(context.forward_batch, context.current_timestep):
        return original(stage, *args, **kwargs)


def _calling(batch: Any, step: int) -> Calling:
    for name in ("enable_teacache", "enable_spectrum", "enable_cache_dit"):
        if getattr(batch, name):
            raise EngineError(
                f"the request sets {name}, and two caches cannot work on one model: leave it out of the request"
            )
    branch = batch.extra.get("hero_fx_branch", "negative" if batch.is_cfg_negative else "positive")
    steps = len(batch.timesteps) if batch.timesteps is not None else None
    return hero_fx.calling(session=_session(batch).id, lane=branch, step_index=int(step), num_steps=steps)


def _session(batch: Any) -> Session:
    """A request's own features. One `Req` object is one trajectory, also of merged requests and of realtime chunks."""
    return hero_fx.session(f"{batch.request_id or 'request'}/{id(batch)}")


def _forward(original: Callable[..., Any], stage: Any, batch: Any, server_args: Any) -> Any:
    """The denoising loop of one request; its features are freed however it ends."""
    try:
        return original(stage, batch, server_args)
    finally:
        _session(batch).drop()
