"""`WriteRows`: the graph before and after, and where it must not fire."""

from __future__ import annotations

from typing import Any

import expecttest
import torch
from torch import Tensor

from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.passes.simplify.scatters import ForwardGathers, SinkScatters
from hero_fx.passes.simplify.write_rows import WriteRows

from .support.step_graphs import block, graph, must_not_fire, run, tensors


class Diff(expecttest.TestCase):
    def test_write_rows(self) -> None:
        gm = graph(block, **tensors())
        run(gm, SinkScatters(), ForwardGathers(), DropDeadCode())
        self.assertExpectedInline(
            run(gm, WriteRows())[1],
            """\
  ...
- index_copy: f32[2, 5, 3] = aten.index_copy.default(s1, 1, idx, v)
  ...
- copy_: f32[2, 5, 3] = aten.copy_.default(s1, index_copy)
+ index_copy__default: f32[2, 5, 3] = aten.index_copy_.default(s1, 1, idx, v)
  ...""",
        )


def test_rows_are_not_written_before_a_later_reader() -> None:
    def late(s1: Tensor, v: Tensor, idx: Tensor) -> Tensor:
        merged = torch.index_copy(s1, 1, idx, v)
        out = merged.sin() + s1.cos()  # reads the old state behind the scatter
        s1.copy_(merged)
        return out

    must_not_fire(late, WriteRows(), **{n: tensors()[n] for n in ("s1", "v", "idx")})


def test_rows_are_not_written_in_front_of_a_reader_of_a_view_nor_into_what_is_returned() -> None:
    def late_view(s1: Tensor, v: Tensor, idx: Tensor) -> Any:
        view = s1[:, 1:]
        merged = torch.index_copy(s1, 1, idx, v)
        out = merged.sin()[:, 1:] + view.cos()
        s1.copy_(merged)
        return out

    def returned(s1: Tensor, v: Tensor, idx: Tensor) -> Any:
        merged = torch.index_copy(s1, 1, idx, v)
        s1.copy_(merged)
        return merged[0]

    inputs = {n: tensors()[n] for n in ("s1", "v", "idx")}
    for function in (late_view, returned):
        must_not_fire(function, WriteRows(), **inputs)


def test_a_buffer_of_the_models_own_is_not_written_by_rows() -> None:
    def own(buffer: Tensor, v: Tensor, idx: Tensor) -> Any:
        merged = torch.index_copy(buffer, 1, idx, v)
        buffer.copy_(merged)
        return merged.sin()

    must_not_fire(own, WriteRows(), buffer=tensors()["x"], v=tensors()["v"], idx=tensors()["idx"])
