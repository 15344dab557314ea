"""Stability (paper, section 3.2, "hierarchical analysis"): how the features of each layer move along a trajectory.

`Recorder` is a torch.compile backend like `hero_fx.backend`, but it changes nothing: every step computes all layers, and the
graph returns the features of every layer beside its own outputs. With F_t a layer's features at step t, and the differences
D_t = F_t - F_{t-1} and S_t = D_t - D_{t-1}:

=============  ===========================================================================================
reuse          is off by D one step behind a full step (FORA, HERO's shallow layers with `unsampled="reuse"`)
extrapolation  is off by S one step behind two full steps in a row (TaylorSeer, HERO's deep layers, Eq. 6, and by default
               the tokens of shallow ones that are not sampled)
stability      of a layer: variance over t of S, mean over tokens and channels, scaled to [0, 1] over the layers, 1 = stable
=============  ===========================================================================================
"""

from hero_fx.passes.rewrite.observe import Features

from .recorder import Recorder
from .result import Stability, split

__all__ = ["Features", "Recorder", "Stability", "split"]
