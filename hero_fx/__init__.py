"""HERO step caching for diffusion transformers, as a torch.compile backend."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from hero_fx.passes.render import graph_counts_diff, graph_diff, op_count, render
from hero_fx.runtime.batch import Batch, batch
from hero_fx.runtime.batched import NotBatched
from hero_fx.runtime.budget import OverBudget
from hero_fx.runtime.calling import Calling, Session, calling, reset, session
from hero_fx.runtime.timestep import AmbiguousCall
from hero_fx.verification.trial import Check
from hero_fx.verification.verify import Verification, verify
from hero_fx.warm.load import Loaded, load
from hero_fx.warm.save import save

from .backends import Backend, backend
from .calibration import Calibration, calibrate
from .checks import UnsupportedModel
from .config import Config
from .flops import Flops, flops, step_kinds, trajectory_flops
from .plan import Fingerprint, Plan, Timeline
from .policy import Policy
from .report import Explanation, explain
from .stats import Stats
from .step_graphs import StepGraphs
from .tracing import trace

if TYPE_CHECKING:
    from . import stability

__version__ = "0.1.0"

__all__ = [
    "AmbiguousCall",
    "Backend",
    "Batch",
    "Calibration",
    "Calling",
    "Check",
    "Config",
    "Explanation",
    "Fingerprint",
    "Flops",
    "Loaded",
    "NotBatched",
    "OverBudget",
    "Plan",
    "Policy",
    "Session",
    "Stats",
    "StepGraphs",
    "Timeline",
    "UnsupportedModel",
    "Verification",
    "backend",
    "batch",
    "calibrate",
    "calling",
    "explain",
    "flops",
    "graph_counts_diff",
    "graph_diff",
    "load",
    "op_count",
    "render",
    "reset",
    "save",
    "session",
    "stability",
    "step_kinds",
    "trace",
    "trajectory_flops",
    "verify",
]


if not TYPE_CHECKING:  # a type checker would take every name for a module

    def __getattr__(name: str) -> ModuleType:
        """Imports `hero_fx.stability` when it is first used: models that are only run do without it."""
        if name == "stability":
            return import_module(".stability", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
