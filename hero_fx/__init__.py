"""HERO step caching for diffusion transformers, as a torch.compile backend."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from .backends import Backend, Stats, backend
from .calibration import Calibration, calibrate
from .calling import Calling, Session, calling, reset, session
from .checks import UnsupportedModel
from .config import Config
from .plan import Fingerprint, Plan, Timeline
from .policy import Policy
from .report import Explanation, Flops, explain, flops, step_kinds, trace, trajectory_flops
from .steps import StepGraphs
from .timestep import AmbiguousCall
from .verify import Check, Verification, verify

if TYPE_CHECKING:
    from . import analysis

__version__ = "0.1.0"

__all__ = [
    "AmbiguousCall",
    "Backend",
    "Calibration",
    "Calling",
    "Check",
    "Config",
    "Explanation",
    "Fingerprint",
    "Flops",
    "Plan",
    "Policy",
    "Session",
    "Stats",
    "StepGraphs",
    "Timeline",
    "UnsupportedModel",
    "Verification",
    "analysis",
    "backend",
    "calibrate",
    "calling",
    "explain",
    "flops",
    "reset",
    "session",
    "step_kinds",
    "trace",
    "trajectory_flops",
    "verify",
]


if not TYPE_CHECKING:  # a type checker would take every name for a module

    def __getattr__(name: str) -> ModuleType:
        """Imports `hero_fx.analysis` when it is first used: models that are only run do without it."""
        if name == "analysis":
            return import_module(".analysis", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
