"""A rewrite must never change what a model does by itself: its buffers, its gathers and scatters, what it returns."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.slots import FeatureSlot, StateSlot, slots_of
from hero_fx.step_graphs import check_state

from .support import small
from .support.small import FULL, Block, hero, run
from .support.tracing import capture, trace

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TOLERANCE = 2e-5


def check(model: small.Small, *policies: str) -> None:
    """Full steps are the model's; the collapsed form, through AOTAutograd, is the literal one as it is."""
    traced = small.traced(model)
    for policy in policies:
        literal = run(traced.by(small.backend(policy, form="literal", inner="eager")))
        collapsed = run(traced.by(small.backend(policy)))
        worst = small.error(collapsed, literal)
        assert worst < TOLERANCE, policy
        x, eager = small.start(), copy.deepcopy(model)
        with torch.no_grad():
            for step, t in enumerate(small.TIMES):
                theirs = eager(x.clone(), t.expand(small.BATCH))
                if step in FULL:
                    worst = small.error([collapsed[step]], [theirs])
                    assert worst < TOLERANCE, f"{policy}, step {step}"
                x = x - small.tensors(collapsed[step])[0] / len(small.TIMES)


def many_ffns(block: Block, x: Tensor, time: Tensor) -> Tensor:
    x = x + block.attention(x)
    for number in range(12):
        x = x + (number + 1) * block.ffn(x.roll(1, -1) * (number - 5))
    return x


def test_each_of_many_branches_of_a_layer_has_its_own_state() -> None:
    model = small.small(many_ffns, small.plain, clock=0.0)
    theirs, traced = run(model, constant=True), small.traced(model)
    for policy, inner in (("fora", "eager"), ("taylorseer", "eager"), ("hero", "aot_eager")):
        worst = small.error(run(traced.by(small.backend(policy, inner=inner)), constant=True), theirs)
        assert worst < TOLERANCE, (policy, inner)


def slice_written(block: Block, x: Tensor, time: Tensor) -> Tensor:
    block.scratch.fill_(0.5)  # what the last call left in it says nothing about this one
    before = block.scratch * 2
    block.scratch[1:3] = x[0, 1:3]
    return small.plain(block, x + before + block.scratch * 2, time)


def diagonal_written(block: Block, x: Tensor, time: Tensor) -> Tensor:
    block.scratch.fill_(0.5)  # what the last call left in it says nothing about this one
    before = block.scratch * 2
    block.scratch.diagonal().copy_(x[0, 0])
    return small.plain(block, x + before + block.scratch * 2, time)


@pytest.mark.parametrize("layer", [slice_written, diagonal_written])
def test_a_buffer_read_written_through_a_view_and_read_again(layer: small.Layer) -> None:
    check(small.small(layer, layer), "hero", "fora")


def own_scatter(block: Block, x: Tensor, time: Tensor) -> Tensor:
    """By all tokens, counted from the right: a table that is not taken by the same indices would be of the right size."""
    x = x + block.scratch * torch.index_copy(x, -2, block.perm, x * 0.5)
    return small.plain(block, x.index_select(-2, block.perm), time)


def repeated(block: Block, x: Tensor, time: Tensor) -> Tensor:
    """What is gathered is the last of the rows that were scattered to one place."""
    twice = torch.cat([block.perm[:1]] * 2)
    x = x + torch.index_copy(x, 1, twice, x[:, 2:4]).index_select(1, twice)[:, :1]
    return small.plain(block, x, time)


@pytest.mark.parametrize("layer", [own_scatter, repeated])
def test_the_models_own_gathers_and_scatters_stay(layer: small.Layer) -> None:
    check(small.small(layer, layer), "hero", "fora")


def shown(block: Block, x: Tensor, time: Tensor) -> Any:
    x = x + block.attention(x)
    update = block.ffn(x)
    return x + update, update


def both(x: Tensor, more: list[Tensor]) -> Any:
    return x, *more


def a_view(x: Tensor, more: list[Tensor]) -> Any:
    return {"x": x, "more": [more[0][:, 1:].transpose(0, 1), more[0]], "again": more[0]}


def alone(x: Tensor, more: list[Tensor]) -> Any:
    return more[-1]


@pytest.mark.parametrize(("end", "form"), [(both, "collapsed"), (a_view, "literal"), (alone, "collapsed")])
def test_what_a_call_returned_stays(end: small.End, form: str) -> None:
    traced = small.traced(small.small(shown, shown, end=end))
    policies, inners = ("fora", "fora behind the gate", "hero", "reuse"), ("eager", "aot_eager")
    # All of them where the update is returned as it is; else each policy in turns by the one or the other.
    pairs = product(policies, inners) if end is both else zip(policies, inners * 2, strict=True)
    for policy, inner in pairs:
        compiled = traced.by(small.backend(inner=inner, form=form, policy=policy))
        returned, copies = [], []
        with torch.no_grad():
            for number, t in enumerate((*small.TIMES, *small.TIMES)):
                returned.append(compiled(small.start(number), t.expand(small.BATCH)))
                copies.append(small.tensors(returned[-1]))
        for output, copied in zip(returned, copies, strict=True):
            assert all(map(torch.equal, small.tensors(output), copied)), (policy, inner)


class Aliases(torch.nn.Module):
    """Returns its input, a view of it, and the update of its last layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small.small(shown, shown, end=both)

    def forward(self, latents: Tensor, timestep: Tensor) -> Any:
        x, first, last = self.inner(latents, timestep)
        return latents, latents[:, 1:], x, first, last, last


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_outputs_share_memory_as_the_models_do(inner: str) -> None:
    compiled = hero(Aliases().eval(), "fora", inner=inner)
    for t in small.TIMES:
        x = small.start()
        with torch.no_grad():
            same, view, _, first, last, again = compiled(x, t.expand(small.BATCH))
        assert same is x
        assert view.data_ptr() == x[:, 1:].data_ptr()
        assert last is again
        assert first.data_ptr() != last.data_ptr()


def test_inductor_returns_no_state() -> None:
    model = small.small(shown, shown, end=both)
    traced = small.traced(model)
    compiled, plain = (traced.by(small.backend("taylorseer", inner=inner)) for inner in ("inductor", "eager"))
    assert small.error(run(compiled), run(plain)) < TOLERANCE


def test_state_of_equal_names_is_not_one() -> None:
    first, second = FeatureSlot("l0_ffn", "image", 1), FeatureSlot("l0_ffn", "image#1")
    assert first.name == second.name
    gm = trace(lambda x: x + 1, torch.ones(2, 3))
    emitter = Emitter(gm)
    nodes = [
        emitter.state(slot, value_of(gm.graph.output_node().all_input_nodes[0])) for slot in (first, second, first)
    ]
    assert nodes[0] is nodes[2]
    assert nodes[0].name != nodes[1].name
    assert [slot for _, slot in slots_of(gm)] == [first, second]


def test_step_graphs_that_disagree_about_their_state_are_an_error() -> None:
    gm, inputs = capture(small.small(), small.start(), torch.full((small.BATCH,), 5))
    steps = hero_fx.backend("fora").trace(gm, inputs)
    (cached,) = steps.cached
    node = next(node for node, slot in slots_of(cached) if isinstance(slot, StateSlot))
    node.meta["val"] = value_of(node).double()
    with pytest.raises(AssertionError, match=f"disagree about the state {node.meta['slot'].name}: .*float64.*float32"):
        check_state(steps)


def test_state_that_gets_out_is_an_error() -> None:
    gm, inputs = capture(small.small(), small.start(), torch.full((small.BATCH,), 5))
    steps = hero_fx.backend("fora").trace(gm, inputs)
    (cached,) = steps.cached
    node = next(node for node, slot in slots_of(cached) if isinstance(slot, StateSlot))
    cached.graph.output_node().args = ((node,),)
    with pytest.raises(AssertionError, match=rf"the state {node.name} is an output"):
        check_state(steps)


def test_branches_that_the_model_writes_to_are_named() -> None:
    def layer(block: Block, x: Tensor, time: Tensor) -> Tensor:
        x = x + block.attention(x)
        update = block.ffn(x)
        update[0].diagonal().add_(1)
        return x + update

    gm, inputs = capture(small.small(layer, layer), small.start(), torch.full((small.BATCH,), 5))
    fallbacks = hero_fx.backend(**small.POLICIES["hero"]).trace(gm, inputs).fallbacks
    assert [fallback.branch for fallback in fallbacks] == ["l0_ffn", "l1_ffn"]
    assert all("writes to its memory in place" in fallback.reason for fallback in fallbacks)
