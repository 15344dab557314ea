"""Feature state in 8-bit floats: rows written as bytes."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.graphs import op_count
from hero_fx.passes.narrow import WriteBytes

from . import tiny
from .test_collapse import graph, outputs, run

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
- index_copy_: f8e4m3[2, 5, 3] = aten.index_copy_.default(s1, 1, idx, to_1)
+ view_dtype: u8[2, 5, 3] = aten.view.dtype(s1, u8)
+ view_dtype_1: u8[2, 2, 3] = aten.view.dtype(to_1, u8)
+ index_copy__default: u8[2, 5, 3] = aten.index_copy_.default(view_dtype, 1, idx, view_dtype_1)
  ...""",
        )


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
        backend = hero_fx.backend(inner="eager", state_dtype=dtype, **options)
        found[dtype] = tiny.denoise(captured.compiled(backend), kwargs, times)
        sizes[dtype] = backend.stats().state_bytes
    near, far = (tiny.worst(found[dtype], found[None]) for dtype in (torch.bfloat16, FLOAT8))
    assert 0 < near < far < 0.02
    assert sizes[FLOAT8] * 4 == sizes[torch.bfloat16] * 2 == sizes[None]


def test_rows_are_summed_before_they_are_narrowed() -> None:
    """Merged caches of `lean`: one rounding of the sum, not one of every summand."""
    steps = hero_fx.trace(
        tiny.cogvideox(), **tiny.inputs(), timestep=torch.tensor([9, 9]), backend=hero_fx.backend("lean")
    )
    narrow = hero_fx.backend("lean", state_dtype=FLOAT8).rewrite(steps).cached[0]
    assert op_count(narrow)["aten.index_copy_"] == op_count(steps.cached[0])["aten.index_copy_"]
    for node in narrow.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor:
            assert all(source.meta["val"].dtype == torch.float32 for source in node.all_input_nodes)
