"""The plugin for vLLM-Omni: `HERO_FX='{}' vllm serve ... --omni --diffusion-compile-granularity full`.

vLLM-Omni compiles layers one by one unless it is told to compile whole transformers; the plugin makes hero_fx the backend of
those. Each execution of a request, or of requests merged into one batch, is a session; its steps and branches of guidance are
told from the calls themselves, since the forward context knows them in some models only.

Nothing of vLLM-Omni is imported until its plugin loader calls `activate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import hero_fx

from .settings import VARIABLE, EngineError, is_on, new_backend

__all__ = ["activate"]


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


def _check_engine(config: Any) -> None:
    """Refuses settings of the engine that would leave hero_fx out, or make it wrong."""
    parallel = config.parallel_config
    refused = {
        "--enforce-eager compiles nothing: leave it out": config.enforce_eager,
        "layers are compiled one by one, and HERO needs the whole transformer: add --diffusion-compile-granularity full": (
            config.diffusion_compile_granularity != "full"
        ),
        f"cache_backend={config.cache_backend!r} caches too: leave it out": config.cache_backend not in (None, "none"),
        "step execution mixes requests in one call, which this plugin does not tell apart: leave step_execution out": (
            config.step_execution
        ),
        "sequence parallelism is not served through this engine yet: set its size to 1": (
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
        model.compile(backend=new_backend(), dynamic=runner.od_config.diffusion_compile_dynamic)


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

    return load_model


def _execute_request_list(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def execute(runner: Any, reqs: list[Any], **kwargs: Any) -> Any:
        session = hero_fx.session("+".join(str(request.request_id) for request in reqs))
        try:
            with session:
                return original(runner, reqs, **kwargs)
        finally:
            session.drop()

    return execute
