"""diffusers' `cache_context(name, step_index=...)`, heard by the backend.

diffusers' pipelines wrap each call of the transformer in `cache_context("cond")` or `cache_context("uncond")`, which
tells the stateful hooks registered on the module which call this is. The listener below registers as such a hook
without touching `forward`, so that nothing recompiles and no graph breaks. All of diffusers' private API is used here.
"""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["ContextListener", "listen"]

_NAME = "hero_fx_context"


class ContextListener:
    """The cache context that a module is called in, if any."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def current(self) -> tuple[str | None, int | None]:
        """(name, step index) of the context; None for what is not given."""
        context = self._manager.seen
        if context is None:
            return None, None
        if isinstance(context, str):
            return context, None
        return context.name, context.step_index


def listen(module: torch.nn.Module | None) -> ContextListener | None:
    """Listens to the cache contexts of a diffusers model; None if the module has none, or diffusers is not in use."""
    if module is None or "diffusers" not in sys.modules or not hasattr(module, "cache_context"):
        return None
    try:
        from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
    except ImportError:
        return None

    registry = HookRegistry.check_if_exists_or_initialize(module)
    if _NAME in registry.hooks:
        return ContextListener(vars(registry.hooks[_NAME])["manager"])

    class Manager(StateManager):
        seen: Any = None

        def set_context(self, context: Any) -> None:
            self.seen = context

    class Listener(ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.manager: Any = Manager(BaseState)  # type: ignore[arg-type]

        def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
            return module

    # Not `register_hook`: that would wrap the module's forward, which is being compiled at this moment.
    listener = Listener()
    registry.hooks[_NAME] = listener
    registry._hook_order.append(_NAME)
    listener.manager.seen = _entered(module)
    return ContextListener(listener.manager)


def _entered(module: torch.nn.Module) -> Any:
    """The context that the module is in already: entered before anyone listened, only the suspended generator of its
    `cache_context` still holds it."""
    for holder in gc.get_referrers(module):
        frame = getattr(holder, "gi_frame", None)
        if frame is not None and frame.f_code.co_name == "cache_context":
            index = frame.f_locals.get("kwargs", {}).get("step_index")
            return SimpleNamespace(name=frame.f_locals["name"], step_index=index)
    return None
