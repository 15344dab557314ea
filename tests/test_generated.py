"""Generated transformers: whatever a model does in its layers, its steps are its own or what the literal form makes of them.

Each program below is one layer: a list of the statements of `support/statements.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import starmap
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hero_fx
from hero_fx.checks import UnsupportedModel
from hero_fx.passes.compat import argument_name

from .support import small
from .support.small import POLICIES, TOKENS, WIDTH, norm
from .support.statements import STATEMENTS, TEXT, State
from .support.tracing import Shared, capture

BATCH, STEPS = 2, 4  # full, cached, full, cached
TOLERANCE = 5e-5


class Generated(nn.Module):
    """The layers one after another; with a clock of 0 all timesteps are one.

    The buffers of the blocks start over at every call, so that a call is a function of its inputs.
    """

    clock: Tensor

    def __init__(self, programs: tuple[tuple[str, ...], ...]) -> None:
        super().__init__()
        self.programs = programs
        self.register_buffer("clock", torch.tensor(0.01))
        self.first, self.words = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(small.Block() for _ in programs)

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Any:
        gate = 1 + 0.5 * (timestep[:, None, None] * self.clock).sin()
        state = State(self.blocks[0], self.first(latents) * gate, self.words(text), gate)  # type: ignore[arg-type]
        for program, block in zip(self.programs, self.blocks, strict=True):
            state.block = block  # type: ignore[assignment]
            state.block.scratch.copy_(torch.arange(TOKENS * WIDTH).view(TOKENS, WIDTH) * 0.05)
            for name in program:
                STATEMENTS[name](state)
        return self.last(norm(state.x)), state.text, state.more


def inputs(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    latents, text = (torch.randn(BATCH, n, WIDTH, generator=generator) for n in (TOKENS, TEXT))
    return latents, text, torch.full((BATCH,), 900 - 100 * step)


class Run:
    """A model as one callable of (latents, text, timestep) -> its outputs in a row, for many backends."""

    def __init__(self, programs: tuple[tuple[str, ...], ...]) -> None:
        torch.manual_seed(0)
        self.model = Generated(programs).eval().requires_grad_(False)
        self.gm, self.example = capture(self.model, *inputs(0))
        self.shared = Shared(self.gm, self.example)
        names = [argument_name(node) for node in self.gm.graph.find_nodes(op="placeholder")]
        self.at = [names.index(name) for name in ("latents", "text", "timestep")]

    def compiled(self, **options: Any) -> tuple[Callable[..., Any], hero_fx.Backend]:
        backend = hero_fx.backend(**{"warmup": 1, "cooldown": 0, **options})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of branches that are left to the model
            return self.shared.compiled(backend), backend

    def outputs(self, run: Callable[..., Any], steps: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor]]:
        """What each call returns, when all are over; that it is what it was when it was returned is checked."""
        returned, copies = [], []
        for step in steps:
            values = list(self.example)
            for at, value in zip(self.at, step, strict=True):
                values[at] = value.clone()
            with torch.no_grad():
                returned.append(list(run(*values)))
            copies.append([value.clone() for value in returned[-1]])
        assert all(starmap(torch.equal, pairs(returned, copies))), "what a call returned has changed"
        return returned


def pairs(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]


def error(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs(ours, theirs))


def check(programs: tuple[tuple[str, ...], ...], policy: str, inner: str = "eager") -> None:
    """Full steps, the collapsed form, a constant trajectory, and what was returned before, of one model."""
    moving, still = [inputs(step) for step in range(STEPS)], [inputs(0)[:2] + inputs(step)[2:] for step in range(STEPS)]
    model = Run(programs)
    plain = model.outputs(model.gm.forward, moving)
    options = {"inner": inner, **POLICIES[policy]}
    run, backend = model.compiled(**options)
    ours = model.outputs(run, moving)
    worst = error(ours[::2], plain[::2])
    assert worst < TOLERANCE, "full steps"
    worst = error(ours, model.outputs(model.compiled(**options, form="literal")[0], moving))
    assert worst < TOLERANCE, "literal form"
    if policy != "lean":  # its sampled tokens see none of the others
        model.model.clock.zero_()
        backend.reset()
        worst = error(model.outputs(run, still), model.outputs(model.gm.forward, still))
        assert worst < TOLERANCE, "constant trajectory"


@st.composite
def layers(draw: Any) -> tuple[str, ...]:
    """Attention and an FFN, without which it would be no layer, with statements of any kind in front, between and behind."""
    front, between, behind = (draw(st.lists(st.sampled_from(sorted(STATEMENTS)), max_size=1)) for _ in range(3))
    attention, ffn = draw(st.sampled_from(["attend", "attend_jointly"])), draw(st.sampled_from(["feed", "feed_gated"]))
    return (*front, attention, *between, ffn, *behind)


PROGRAMS = st.tuples(layers(), layers())


# Statements that gave wrong results once, and a policy that showed it.
FOUND = {
    "return_the_update": "fora",
    "scatter_own": "hero",
    "scatter_repeated": "hero",
    "write_a_slice_of_the_buffer": "hero",
    "write_a_diagonal_of_the_buffer": "fora",
    "write_the_buffer_within_a_branch": "hero",
    "write_the_buffer_from_a_branch": "hero",
    "write_the_stream": "hero",
    "write_the_update": "fora",
    "write_the_update_behind_its_use": "hero",
    "write_what_a_branch_reads": "hero",
    "write_the_keys": "hero",
}


@pytest.mark.parametrize("name", list(FOUND))
def test_what_was_wrong_once(name: str) -> None:
    check(((name, "attend", "feed"), (name, "attend", "feed_gated")), FOUND[name])


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(PROGRAMS, st.sampled_from(sorted(POLICIES)))
def test_models_of_any_make(programs: tuple[tuple[str, ...], ...], policy: str) -> None:
    try:
        check(programs, policy)
    except UnsupportedModel:
        reject()  # streams that the gathers cut off from each other
