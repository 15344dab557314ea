"""What makes a process of tests quick, and no test looks at."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import imageio.plugins.pyav
import torch
from torch._dynamo import guards

__all__ = ["close_quickly", "collect_seldom", "compile_quickly"]


def compile_quickly() -> None:
    """Leaves out what Dynamo does behind each of a thousand compiles: collect garbage, and flush the processor's caches to
    measure how long the guards take."""
    torch._dynamo.config.run_gc_after_compile = False
    vars(guards)["profile_guard_manager"] = lambda *_: 0.0


def collect_seldom() -> None:
    """Tracing makes many objects, and each full collection would walk all modules: a seventh of the time of the suite."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000_000, 1000, 1000)


def close_quickly() -> None:
    """Files of videos are closed without a full collection each, which joins the threads of filters: nothing here filters."""
    vars(imageio.plugins.pyav)["gc"] = SimpleNamespace(collect=lambda: 0)
