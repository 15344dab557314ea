"""HERO step caching for diffusion transformers, as a torch.compile backend."""

from .backends import Backend, Stats, backend
from .checks import UnsupportedModel
from .config import Config
from .policy import Policy
from .report import Explanation, Flops, explain, flops, step_kinds, trace, trajectory_flops
from .state import Session, reset, session
from .steps import StepGraphs
from .verify import Check, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Check",
    "Config",
    "Explanation",
    "Flops",
    "Policy",
    "Session",
    "Stats",
    "StepGraphs",
    "UnsupportedModel",
    "Verification",
    "backend",
    "explain",
    "flops",
    "reset",
    "session",
    "step_kinds",
    "trace",
    "trajectory_flops",
    "verify",
]
