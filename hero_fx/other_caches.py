"""Other caches on a model: diffusers' hooks and cache-dit. Two caches at once would each cache what the other made up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["cache_in_the_way"]

# Modules of `diffusers.hooks` whose hooks leave what a layer computes as it is.
_HARMLESS = {
    "hooks", "group_offloading", "layerwise_casting", "context_parallel", "tensor_parallel", "tensor_parallel_neuron",
}  # fmt: skip


def cache_in_the_way(module: torch.nn.Module | None) -> str | None:
    """Which cache (or other hook that changes what layers compute) a model has, and how to take it off; None if none."""
    if module is None:
        return None
    if _comes_from(vars(module).get("forward"), "cache_dit"):
        return "cache-dit caches this model already; take it off with cache_dit.disable_cache(pipe)"
    config = getattr(module, "_cache_config", None)
    if config is not None and type(config).__module__.startswith("diffusers."):
        return (
            f"diffusers' {type(config).__name__.removesuffix('Config')} caches this model already (model.enable_cache); take "
            "it off with model.disable_cache()"
        )
    for path, name, hook in _hooks(module):
        where = type(hook).__module__
        if where.startswith("diffusers.hooks.") and where.removeprefix("diffusers.hooks.") not in _HARMLESS:
            return (
                f"diffusers' {type(hook).__name__.removesuffix('Hook')} changes what {path or 'the model'} computes from call "
                "to call; take it off with model.disable_cache() if model.enable_cache() put it there, else with "
                "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).remove_hook"
                f"({name!r}, recurse=True)"
            )
    return None


def _hooks(module: torch.nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(module path, name, hook) of all diffusers' hooks on a module and within."""
    for path, inner in module.named_modules():
        registry = getattr(inner, "_diffusers_hook", None)
        for name, hook in getattr(registry, "hooks", {}).items():
            yield path, name, hook


def _comes_from(function: Any, package: str) -> bool:
    """True if a function, or the one that a method or a partial holds, is code of a package."""
    for attribute in ("func", "__func__"):
        function = getattr(function, attribute, function)
    name = str(getattr(function, "__globals__", {}).get("__name__", ""))
    return name == package or name.startswith(f"{package}.")
