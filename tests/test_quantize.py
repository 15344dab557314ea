"""Feature state in 8 bits: floats, with rows written as bytes, and whole numbers with scales."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.passes.render import op_count
from hero_fx.passes.simplify.quantize import QuantizeState, WriteBytes
from hero_fx.passes.slots import ScaleSlot

from .support import tiny
from .support.step_graphs import graph, outputs, run

FLOAT8 = torch.float8_e4m3fn


def write(s1: Tensor, v: Tensor, idx: Tensor) -> Tensor:
    rows = s1.to(torch.float32) + 1
    torch.ops.aten.index_copy_.default(s1, 1, idx, v.to(s1.dtype))
    return rows


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state, rows = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 2, 3, generator=generator)
    return {"s1": state.to(dtype), "v": rows, "idx": torch.tensor([1, 4])}


class Diff(expecttest.TestCase):
    def test_write_bytes(self) -> None:
        sites, diff = run(graph(write, **inputs(FLOAT8)), WriteBytes())
        assert sites == 1
        self.assertExpectedInline(
            diff,
            """\
  ...
- index_copy_: f8e4m3fn[2, 5, 3] = aten.index_copy_.default(s1, 1, idx, to_1)
+ view_dtype: u8[2, 5, 3] = aten.view.dtype(s1, u8)
+ view_dtype_1: u8[2, 2, 3] = aten.view.dtype(to_1, u8)
+ index_copy__default: u8[2, 5, 3] = aten.index_copy_.default(view_dtype, 1, idx, view_dtype_1)
  ...""",
        )


def read_and_write(s1: Tensor, v: Tensor, idx: Tensor) -> Tensor:
    before = s1 + 1
    torch.ops.aten.index_copy_.default(s1, 1, idx, v)
    return before * s1


class DiffOfWholeNumbers(expecttest.TestCase):
    def test_quantize_state(self) -> None:
        sites, diff = run(graph(read_and_write, **inputs(torch.float32)), QuantizeState())
        assert sites == 1
        self.assertExpectedInline(
            diff,
            """\
- s1: f32[2, 5, 3] = input
+ s1: i8[2, 5, 3] = input
  ...
- add: f32[2, 5, 3] = aten.add.Tensor(s1, 1)
- index_copy_: f32[2, 5, 3] = aten.index_copy_.default(s1, 1, idx, v)
- mul: f32[2, 5, 3] = aten.mul.Tensor(add, index_copy_)
+ s1_image_y0_scale: f32[2, 5, 1] = input
+ to_dtype: f32[2, 5, 3] = aten.to.dtype(s1, f32)
+ mul_tensor: f32[2, 5, 3] = aten.mul.Tensor(to_dtype, s1_image_y0_scale)
+ add: f32[2, 5, 3] = aten.add.Tensor(mul_tensor, 1)
+ to: f32[2, 2, 3] = aten.to.dtype(v, f32)
+ abs_1: f32[2, 2, 3] = aten.abs.default(to)
+ amax: f32[2, 2, 1] = aten.amax.default(abs_1, [-1], True)
+ div: f32[2, 2, 1] = aten.div.Tensor(amax, 127)
+ clamp_min: f32[2, 2, 1] = aten.clamp_min.default(div, 1.1754943508222875e-38)
+ to_1: f32[2, 2, 3] = aten.to.dtype(to, f32)
+ div_1: f32[2, 2, 3] = aten.div.Tensor(to_1, clamp_min)
+ round_1: f32[2, 2, 3] = aten.round.default(div_1)
+ to_2: i8[2, 2, 3] = aten.to.dtype(round_1, i8)
+ to_3: f32[2, 2, 3] = aten.to.dtype(v, f32)
+ abs_2: f32[2, 2, 3] = aten.abs.default(to_3)
+ amax_1: f32[2, 2, 1] = aten.amax.default(abs_2, [-1], True)
+ div_2: f32[2, 2, 1] = aten.div.Tensor(amax_1, 127)
+ index_copy__default: i8[2, 5, 3] = aten.index_copy_.default(s1, 1, idx, to_2)
+ index_copy__default_1: f32[2, 5, 1] = aten.index_copy_.default(s1_image_y0_scale, 1, idx, div_2)
+ to_dtype_1: f32[2, 5, 3] = aten.to.dtype(s1, f32)
+ mul_tensor_1: f32[2, 5, 3] = aten.mul.Tensor(to_dtype_1, s1_image_y0_scale)
+ mul: f32[2, 5, 3] = aten.mul.Tensor(add, mul_tensor_1)
  ...""",
        )


def test_whole_numbers_are_the_nearest() -> None:
    gm, values = graph(read_and_write, **inputs(torch.float32)), inputs(torch.float32)
    run(gm, QuantizeState())
    old = values["s1"]
    scale = old.abs().amax(dim=-1, keepdim=True) / 127
    stored, scales = torch.round(old / scale).to(torch.int8), scale.clone()
    given = {**values, "s1": stored, "s1_image_y0_scale": scales}
    result = gm(*[given[node.name] for node in gm.graph.find_nodes(op="placeholder")])
    new = old.clone()
    new[:, [1, 4]] = values["v"]
    # Both reads saw what was there at the time, the second one fresh rows; each is off by half a scale at most.
    half = new.abs().amax(dim=-1, keepdim=True) / 127 / 2 * 1.001
    assert ((stored * scales - new).abs() <= half).all()
    torch.testing.assert_close(result, (torch.round(old / scale) * scale + 1) * (stored * scales))


def test_scores_and_gates_stay_as_they_are() -> None:
    def function(s1: Tensor, s2: Tensor) -> Tensor:
        return s1 + s2[:, 0, :]

    gm = graph(function, s1=torch.ones(2, 5), s2=torch.ones(2, 1, 5))
    assert run(gm, QuantizeState()) == (0, "")


@pytest.mark.parametrize("form", ["literal", "collapsed"])
@pytest.mark.parametrize("options", [{}, {"policy": "lean"}, {"policy": "toca"}, {"unsampled": "gate"}], ids=str)
def test_trajectory_with_whole_numbers(options: dict[str, Any], form: str) -> None:
    options = {"inner": tiny.INNER, "num_steps": 12, "interval": 3, "form": form, **options}
    captured = tiny.captured(layers=2)
    own, narrow = (hero_fx.backend(state_dtype=dtype, **options) for dtype in (None, torch.int8))
    theirs, ours = (
        tiny.denoise(captured.compiled(backend), tiny.inputs(), tiny.timesteps(12)) for backend in (own, narrow)
    )
    assert 0 < tiny.worst(ours, theirs) < 0.03
    floats, bytes_ = (
        sum(s.nbytes for s in b.graphs[0].state if len(s.shape) > 2 and 1 not in s.shape[-2:]) for b in (own, narrow)
    )
    scales = sum(s.nbytes for s in narrow.graphs[0].state if isinstance(s.slot, ScaleSlot))
    assert bytes_ == floats // 4
    assert 0 < scales <= floats // 16


def test_writes_the_same_bits() -> None:
    gm, values = graph(write, **inputs(FLOAT8)), inputs(FLOAT8)
    run(gm, WriteBytes())
    result, (state, _, _) = outputs(gm, values)
    assert torch.equal(result, values["s1"].float() + 1)
    expected = values["s1"].float()
    expected[:, [1, 4]] = values["v"].to(FLOAT8).float()
    assert torch.equal(state.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaves_other_dtypes_alone(dtype: torch.dtype) -> None:
    assert run(graph(write, **inputs(dtype)), WriteBytes()) == (0, "")


@pytest.mark.parametrize("options", [{}, {"policy": "lean"}], ids=str)
def test_trajectory(options: dict[str, Any]) -> None:
    """Near full precision, further from it than bfloat16, in a quarter of the bytes."""
    captured, kwargs, times = tiny.captured(layers=2), tiny.inputs(), tiny.timesteps(6)
    found, sizes = {}, {}
    for dtype in (None, torch.bfloat16, FLOAT8):
        backend = hero_fx.backend(inner=tiny.INNER, state_dtype=dtype, **options)
        found[dtype] = tiny.denoise(captured.compiled(backend), kwargs, times)
        sizes[dtype] = backend.stats().state_bytes
    near, far = (tiny.worst(found[dtype], found[None]) for dtype in (torch.bfloat16, FLOAT8))
    assert 0 < near < far < 0.02
    assert sizes[FLOAT8] * 4 == sizes[torch.bfloat16] * 2 == sizes[None]


def test_rows_are_summed_before_they_are_narrowed() -> None:
    """Merged caches of `lean`: one rounding of the sum, not one of every summand."""
    model = tiny.cogvideox(layers=2)
    steps = hero_fx.trace(model, **tiny.inputs(), timestep=torch.tensor([9, 9]), backend=hero_fx.backend("lean"))
    narrow = hero_fx.backend("lean", state_dtype=FLOAT8).rewrite(steps).cached[0]
    assert op_count(narrow)["aten.index_copy_"] == op_count(steps.cached[0])["aten.index_copy_"]
    for node in narrow.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor:
            assert all(source.meta["val"].dtype == torch.float32 for source in node.all_input_nodes)
