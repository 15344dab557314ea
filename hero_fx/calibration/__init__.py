"""Learning plans from a model: record once, solve all least-squares problems, search the schedule, compare candidates."""

from .report import Calibration, Candidate
from .run import calibrate, relative_l2

__all__ = ["Calibration", "Candidate", "calibrate", "relative_l2"]
