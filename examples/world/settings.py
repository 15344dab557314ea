"""What there is to choose from, and where it lies; imports no torch, so that a command can answer at once."""

from __future__ import annotations

from pathlib import Path

TASKS = ("planning", "reconstruction")
STEPS = {"planning": 50, "reconstruction": 30}
"""Default steps, as in the paper."""
GUIDANCE = {"planning": 3.0, "reconstruction": 1.0}
"""Default guidance scales, as in the paper."""
WEIGHTS = Path(__file__).parent / "weights"
"""Where the trained weights lie."""
PLANS = Path(__file__).parent / "plans"
"""Where the calibrated plans lie, one for each task."""
