"""`hero_fx.outputs`: where in a model's inputs the latent of each output lies."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from hero_fx.outputs import find_outputs
from hero_fx.passes.emit import value_of
from hero_fx.passes.rewrite.forecast import arguments_of

from .support import tiny
from .support.forecasts import Conditioned
from .support.steps_by_hand import numbers
from .support.tracing import normal_form

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_outputs_and_their_latents_are_found() -> None:
    sample, time = numbers(2, 5, 4, 6, seed=3), tiny.timesteps(1).expand(2)
    gm = normal_form(Conditioned(extra=2).eval().requires_grad_(False), sample, time)
    position = [n.meta["argument"] for n in gm.graph.find_nodes(op="placeholder")].index("timestep")
    (rule,) = find_outputs(gm, position)
    assert (rule.axis, rule.latent) == (1, "sample")
    gm = normal_form(Conditioned().eval().requires_grad_(False), sample[:, :3], time, numbers(2, 7, 6, seed=4))
    position = [n.meta["argument"] for n in gm.graph.find_nodes(op="placeholder")].index("timestep")
    assert [(r.axis, r.latent) for r in find_outputs(gm, position)] == [(1, "sample"), (2, "audio")]
    with pytest.raises(ValueError, match=r"latent=.time.*sample"):
        find_outputs(gm, position, "time")


def test_channels_of_a_video_are_found_wherever_they_lie() -> None:
    gm = normal_form(tiny.cogvideox(layers=1), **tiny.inputs(), timestep=tiny.timesteps(1).expand(2), return_dict=False)
    position = [n.meta["argument"] for n in gm.graph.find_nodes(op="placeholder")].index("timestep")
    (rule,) = find_outputs(gm, position)
    assert (rule.axis, rule.latent) == (2, "hidden_states")


def test_arguments_without_names_are_told_apart() -> None:
    """A decorated forward takes `*args`: all of them have that name."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Conditioned()

        def forward(self, *args: Tensor) -> Any:
            return self.inner(*args)

    model = Wrapped().eval().requires_grad_(False)
    gm = normal_form(model, numbers(2, 3, 4, 6, seed=3), tiny.timesteps(1).expand(2), numbers(2, 7, 6, seed=4))
    names = arguments_of(gm)
    (time,) = [name for name, node in names.items() if not value_of(node).is_floating_point()]
    found = find_outputs(gm, gm.graph.find_nodes(op="placeholder").index(names[time]))
    assert [value_of(names[str(rule.latent)]).shape for rule in found] == [(2, 3, 4, 6), (2, 7, 6)]
    assert all(str(rule.latent).startswith("args[") for rule in found)
