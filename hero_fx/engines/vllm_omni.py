"""The plugin for vLLM-Omni: `HERO_FX='{}' vllm serve ... --omni --diffusion-compile-granularity full`.

vLLM-Omni compiles layers one by one unless it is told to compile whole transformers; the plugin makes hero_fx the backend of
those. Each execution of a request, or of requests merged into one batch, is a session; its steps and branches of guidance are
told from the calls themselves, since the forward context knows them in some models only. In step mode requests are at steps
of their own, and the runner knows them: there each call is told whose it is.

Nothing of vLLM-Omni is imported until its plugin loader calls `activate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

import hero_fx

from .settings import VARIABLE, EngineError, is_on, new_backend
from .vllm_omni_steps import Steps, current_step, whole_requests

__all__ = ["activate"]

_ROWS = "QwenImagePipeline"
"""The pipeline that makes requests the rows of one call. Others pack them into one sequence, or take one at a time."""

_OPTIONAL_MASK = "QwenImageTransformer2DModel"
"""The transformer that leaves out a text mask that masks nothing. It looks into the mask, which would break its graph."""


def activate() -> None:
    """Puts hero_fx into the model runner, if `HERO_FX` is set. vLLM-Omni calls it in every process; twice is once."""
    if not is_on():
        return
    from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner as Runner

    if getattr(Runner._compile_transformer, "__module__", None) == __name__:
        return
    Runner._compile_transformer = _compile_transformer
    Runner.load_model = _load_model(Runner.load_model)
    Runner._execute_request_list = _execute_request_list(Runner._execute_request_list)
    Runner._execute_stepwise = _execute_stepwise(Runner._execute_stepwise)


def _check_engine(config: Any) -> None:
    """Refuses settings of the engine that would leave hero_fx out, or make it wrong."""
    parallel = config.parallel_config
    refused = {
        "--enforce-eager compiles nothing: leave it out": config.enforce_eager,
        "layers are compiled one by one, and HERO needs the whole transformer: add --diffusion-compile-granularity full": (
            config.diffusion_compile_granularity != "full"
        ),
        f"cache_backend={config.cache_backend!r} caches too: leave it out": config.cache_backend not in (None, "none"),
        f"sequence_parallel_size={parallel.sequence_parallel_size}, under which vLLM-Omni compiles no whole transformer: set "
        "the degrees of Ulysses and ring attention to 1 (for several GPUs see docs/operations.md, Several GPUs)": (
            (parallel.sequence_parallel_size or 1) > 1
        ),
    }
    for why, holds in refused.items():
        if holds:
            raise EngineError(f"{VARIABLE} is set, but {why}. To serve without hero_fx, unset {VARIABLE}")


def _compile_transformer(runner: Any, attr_name: str) -> None:
    """Compiles a transformer of the pipeline. A failure is one of the server: it does not go on uncompiled."""
    model = getattr(runner.pipeline, attr_name, None)
    if model is not None:
        dynamic = runner.od_config.diffusion_compile_dynamic
        if dynamic and runner.od_config.step_execution:
            dynamic = (
                None  # code for one request, as hero_fx.batch needs it, and for any number of them once there are more
            )
        compiled = torch.compile(model.forward, backend=new_backend(), dynamic=dynamic)
        model.forward = _told(compiled, optional_mask=type(model).__name__ == _OPTIONAL_MASK)


def _told(forward: Callable[..., Any], *, optional_mask: bool) -> Callable[..., Any]:
    """A transformer's compiled call, with what the runner knows of it in step mode."""

    @wraps(forward)
    def told(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("encoder_hidden_states_mask") if optional_mask else None
        if mask is not None and mask.all():
            kwargs["encoder_hidden_states_mask"] = None
        step = current_step()
        if step is None:
            return forward(*args, **kwargs)
        with step.next_call():
            return forward(*args, **kwargs)

    return told


def _load_model(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def load_model(runner: Any, *args: Any, **kwargs: Any) -> None:
        _check_engine(runner.od_config)
        original(runner, *args, **kwargs)
        pipeline = runner.pipeline
        if pipeline is not None and hasattr(pipeline, "setup_compile"):
            raise EngineError(
                f"{VARIABLE} is set, but {type(pipeline).__name__} compiles its parts by itself (setup_compile), and not with "
                f"hero_fx: unset {VARIABLE} for this model"
            )
        if pipeline is not None and runner.od_config.step_execution:
            _tell_steps(runner)

    return load_model


def _tell_steps(runner: Any) -> None:
    pipeline, runner.hero_fx_steps = runner.pipeline, Steps()
    pipeline.denoise_step = runner.hero_fx_steps.denoise_step(
        pipeline.denoise_step,
        as_rows=type(pipeline).__name__ == _ROWS,
        together=runner.od_config.diffusion_compile_dynamic,
    )


def _execute_stepwise(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def execute(runner: Any, *args: Any, **kwargs: Any) -> Any:
        with runner.hero_fx_steps.executed(runner.state_cache):
            return original(runner, *args, **kwargs)

    return execute


def _execute_request_list(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def execute(runner: Any, reqs: list[Any], **kwargs: Any) -> Any:
        session = hero_fx.session("+".join(str(request.request_id) for request in reqs))
        try:
            with session, whole_requests():
                return original(runner, reqs, **kwargs)
        finally:
            session.drop()

    return execute
