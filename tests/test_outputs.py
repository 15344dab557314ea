"""`hero_fx.passes.rewrite.outputs`: what a step graph returns is never feature state."""

from __future__ import annotations

from typing import Any

from expecttest import assert_expected_inline
from torch import Tensor

from hero_fx.passes.render import graph_diff, render
from hero_fx.passes.rewrite.outputs import OwnOutputs

from .support.step_graphs import assert_same, graph, outputs, tensors
from .support.tracing import run_passes


def rewritten(function: Any, *names: str) -> tuple[int, str]:
    """(sites, diff) of the pass; what the graph computes must stay, and the state must not be in it."""
    inputs = {name: tensors()[name] for name in names}
    gm, before = graph(function, **inputs), graph(function, **inputs)
    (record,) = run_passes(gm, OwnOutputs())
    assert_same(before, gm, inputs)
    return record.sites, graph_diff(render(before), gm, context=0)


def test_graph() -> None:
    def step(x: Tensor, s1: Tensor) -> Any:
        return x + s1, s1, s1[0]

    assert_expected_inline(
        rewritten(step, "x", "s1")[1],
        """\
  ...
+ clone_default: f32[2, 5, 3] = aten.clone.default(s1)
  ...
- select: f32[5, 3] = aten.select.int(s1, 0, 0)
- return (add, s1, select)
+ select: f32[5, 3] = aten.select.int(clone_default, 0, 0)
+ return (add, clone_default, select)""",
    )


def test_what_was_read_is_returned_though_the_state_is_written_to() -> None:
    def step(x: Tensor, s1: Tensor) -> Any:
        read = s1[0].clone()
        out = s1.reshape(-1)
        s1.mul_(2)
        return x, read, out

    inputs = {name: tensors()[name] for name in ("x", "s1")}
    gm = graph(step, **inputs)
    run_passes(gm, OwnOutputs())
    _, _, out = outputs(gm, inputs)[0]
    assert out.equal(inputs["s1"].reshape(-1))


def test_outputs_that_shared_memory_still_do() -> None:
    def step(s1: Tensor) -> Any:
        return s1, s1.transpose(0, 1), s1[1:]

    inputs = {"s1": tensors()["s1"]}
    gm = graph(step, **inputs)
    run_passes(gm, OwnOutputs())
    results = gm(*inputs.values())
    assert len({out.untyped_storage().data_ptr() for out in results}) == 1
    assert results[0].data_ptr() != inputs["s1"].data_ptr()


def test_inputs_and_values_computed_from_state_are_returned_as_they_are() -> None:
    def step(x: Tensor, s1: Tensor) -> Any:
        s1.copy_(x + s1)
        return x, x[0], s1.bfloat16(), s1 + x, s1.sum()

    assert rewritten(step, "x", "s1") == (0, "")
