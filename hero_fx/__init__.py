"""HERO step caching for diffusion transformers, as a torch.compile backend."""

from .backends import Backend, Stats, backend
from .calibration import Calibration, calibrate
from .checks import UnsupportedModel
from .config import Config
from .plan import Fingerprint, Plan, Timeline
from .policy import Policy
from .report import Explanation, Flops, explain, flops, step_kinds, trace, trajectory_flops
from .state import Session, reset, session
from .steps import StepGraphs

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Calibration",
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
    "backend",
    "calibrate",
    "explain",
    "flops",
    "reset",
    "session",
    "step_kinds",
    "trace",
    "trajectory_flops",
]
