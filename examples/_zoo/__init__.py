"""Tiny transformers of many classes of diffusers, with random weights and inputs: what examples/zoo.py and the tests run."""

from __future__ import annotations

from . import control, cross, dual, dual_single, flex, sequences, single, wan
from .base import ZOO, Sample, sample

__all__ = ["ZOO", "Sample", "control", "cross", "dual", "dual_single", "flex", "sample", "sequences", "single", "wan"]
