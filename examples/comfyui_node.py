"""A node for ComfyUI that samples with step caching: copy this file into ComfyUI's folder `custom_nodes`.

It stands between the node that loads a model and the sampler, and compiles the whole transformer by ComfyUI's own
`set_torch_compile_wrapper`. ComfyUI joins prompts anew at each call, so their memory tells no trajectory from another: the node
says of each call which prompts it is for, and forgets everything when sampling ends, however it ends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper

import hero_fx

__all__ = ["NODE_CLASS_MAPPINGS", "StepCaching"]


class StepCaching:
    """The model, compiled with `hero_fx.backend(**options)`; the options are a JSON object."""

    CATEGORY = "hero_fx"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "options": ("STRING", {"default": '{"refresh_layers": 0}'})}}

    def patch(self, model: Any, options: str) -> tuple[Any]:
        model, backend = model.clone(), hero_fx.backend(**json.loads(options))
        set_torch_compile_wrapper(model, backend=backend, options={"guard_filter_fn": _guards})
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "hero_fx", _of_prompts)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "hero_fx", partial(_sampling, backend))
        return (model,)


def _guards(entries: Sequence[Any]) -> list[bool]:
    """As ComfyUI's own node has it: what it notes in these options at each call is no reason to compile again."""
    return ["transformer_options" not in entry.name for entry in entries]


def _of_prompts(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: Any, **more: Any) -> Any:
    """A call of the model. ComfyUI gives each prompt an id, another one at each sampling."""
    with hero_fx.session(str(options["uuids"])):
        return executor(x, t, concat, text, control, options, **more)


def _sampling(backend: hero_fx.Backend, executor: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return executor(*args, **kwargs)
    finally:
        backend.reset()


NODE_CLASS_MAPPINGS = {"StepCaching": StepCaching}
