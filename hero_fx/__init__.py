"""HERO step caching for diffusion transformers, as a torch.compile backend."""

from .backends import Backend, Stats, backend
from .calling import Calling, Session, calling, reset, session
from .checks import UnsupportedModel
from .config import Config
from .policy import Policy
from .report import Explanation, Flops, explain, flops, step_kinds, trace, trajectory_flops
from .steps import StepGraphs
from .timestep import AmbiguousCall

__version__ = "0.1.0"

__all__ = [
    "AmbiguousCall",
    "Backend",
    "Calling",
    "Config",
    "Explanation",
    "Flops",
    "Policy",
    "Session",
    "Stats",
    "StepGraphs",
    "UnsupportedModel",
    "backend",
    "calling",
    "explain",
    "flops",
    "reset",
    "session",
    "step_kinds",
    "trace",
    "trajectory_flops",
]
