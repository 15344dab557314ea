"""Constants of a model through AOTAutograd: literals, tensors that the model writes in place, weights that Dynamo keeps
as attributes, constants of flex attention's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import hero_fx
from hero_fx.passes.normalize.constants import WriteLiterals
from hero_fx.passes.render import graph_diff, render

from .support import tiny, toys
from .support.tracing import Variants, equal, run_passes, trace

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
STEPS, FULLS = 8, 4
Change = Callable[[Any, Tensor], Tensor]
"""What a model does to its latents [B, TOKENS, CHANNELS] before the first block."""


class Changed(nn.Module):
    """A toy behind changes of its latents, one after the other."""

    def __init__(self, changes: Sequence[Change]) -> None:
        super().__init__()
        self.inner, self.changes = toys.toy(), changes
        self.calls = nn.Buffer(torch.zeros(()))
        self.table = nn.Buffer(torch.linspace(0.5, 1.5, toys.CHANNELS))

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        for change in self.changes:
            latents = change(self, latents)
        result: Tensor = self.inner(latents, timestep)
        return result


def literal(_: Any, x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, -2.0, 3.0, 0.5, 0.25, 2.0]) + torch.tensor(0.5, dtype=torch.float64)


def special_numbers(_: Any, x: Tensor) -> Tensor:
    bound = torch.tensor([float("inf"), -float("inf"), -0.0])
    return torch.where(x > bound[0], bound[1], x) + 0.1 * torch.copysign(torch.ones(()), bound[2])


def half_precision(_: Any, x: Tensor) -> Tensor:
    return x * torch.tensor([0.1, 0.2, 0.3, 0.7, 1 / 3, 3.0], dtype=torch.bfloat16)


def scalar_in_place(_: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[1], dtype=torch.bool)
    mask[3:9] = True
    mask[torch.tensor([1, 20])] = True
    return torch.where(mask[:, None], x, 0.5 * x)


def written_in_place(_: Any, x: Tensor) -> Tensor:
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    before = scale * 2
    scale[1:3] = x.mean()
    scale.mul_(0.5)
    return x * scale + before


def written_twice(_: Any, x: Tensor) -> Tensor:
    """Two literals of one value, of which one is written."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    a.add_(x.mean())
    return x * a.prod() + b.sum()


def buffer_in_place(self: Any, x: Tensor) -> Tensor:
    self.calls.add_(1)
    self.table[1:].mul_(1.01)
    result: Tensor = x * self.table + 0.01 * self.calls
    return result


def _attend(x: Tensor, **options: Any) -> Tensor:
    """Latents gated by flex attention of one head [B, 1, TOKENS, 16], so that it is no branch."""
    padded = nn.functional.pad(x, (0, 16 - toys.CHANNELS))[:, None]
    out: Any = flex_attention(padded, padded, padded, **options)
    result: Tensor = x * out[:, 0, :, : toys.CHANNELS].sigmoid()
    return result


def in_score_function(_: Any, x: Tensor) -> Tensor:
    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return value * torch.tensor(0.5) + torch.tensor(0.1) * (j - i)

    return _attend(x, score_mod=score)


def in_mask_function(_: Any, x: Tensor) -> Tensor:
    """The constant stands in the map that makes the block mask, and in the attention's own function."""

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i + torch.tensor(2) * j) % 3 != torch.tensor([0, 1]).sum()

    return _attend(x, block_mask=create_block_mask(mask, None, None, toys.TOKENS, toys.TOKENS, device="cpu"))


CHANGES = {
    "literals": (literal, special_numbers, half_precision, scalar_in_place),
    "writes": (written_in_place, written_twice, buffer_in_place),
    "functions": (in_score_function, in_mask_function),
}


def check(*changes: Change) -> None:
    """Full steps and buffers are those of plain compilation, cached steps those of the graphs as they are."""
    model = Changed(changes).eval().requires_grad_(False)
    before = [buffer.clone() for buffer in model.buffers()]
    hero, as_it_is = (
        hero_fx.backend(inner=inner, grid=toys.GRID, interval=3, warmup=FULLS) for inner in ("aot_eager", "eager")
    )
    variants = Variants(hero=hero, as_it_is=as_it_is, aot=hero_fx.backend("full", inner="aot_eager"))
    compiled = toys.torch_compile(model, backend=variants, fullgraph=True)

    def trajectory(variant: str) -> list[Tensor]:
        """A closed loop over the model as it was at first, then its buffers."""
        variants.now = variant
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
        outputs = toys.loop(compiled if variant else model, toys.latents(), toys.times(STEPS))
        return [*outputs, *(buffer.clone() for buffer in model.buffers())]

    ours, plain, eager = map(trajectory, ("hero", "aot", ""))
    assert hero.stats().cached_steps == 3
    full, theirs, literally = (
        [*run[:FULLS], *run[STEPS:]] for run in (ours, plain, eager)
    )  # no buffer depends on latents
    assert toys.same(full, theirs)
    assert tiny.worst(full, literally) < 1e-6
    assert toys.same(ours, trajectory("as_it_is"))
    torch._dynamo.reset()


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_constants(changes: Sequence[Change]) -> None:
    check(*changes)


def test_weights_that_dynamo_keeps_as_attributes() -> None:
    """By a setting that `torch.export` uses; what the model writes to them lasts."""
    with torch._dynamo.config.patch(install_free_tensors=True):
        check(buffer_in_place)


def with_literals(x: Tensor) -> Tensor:
    x = x * torch.tensor([[1.0, -0.0], [2.5, 3.0]], dtype=torch.float64)
    x[:, 1] = 7.0
    return x


def test_graph_of_literals() -> None:
    gm = trace(with_literals, torch.ones(2, 2))
    before = render(gm)
    (record,) = run_passes(gm, WriteLiterals())
    assert record.sites == 2
    assert_expected_inline(
        graph_diff(before, gm),
        """\
  x_1: f32[2, 2] = input
- _tensor_constant0: f64[2, 2] = self._tensor_constant0
- lift_fresh_copy: f64[2, 2] = aten.lift_fresh_copy.default(_tensor_constant0)
- detach_: f64[2, 2] = aten.detach_.default(lift_fresh_copy)
+ tensor: f64[2, 2] = torch.tensor([[1.0, -0.0], [2.5, 3.0]], dtype=f64, device=cpu)
+ detach_: f64[2, 2] = aten.detach_.default(tensor)
  mul: f64[2, 2] = aten.mul.Tensor(x_1, detach_)
- _tensor_constant1: f64[] = self._tensor_constant1
- lift_fresh_copy_1: f64[] = aten.lift_fresh_copy.default(_tensor_constant1)
+ tensor_1: f64[] = torch.tensor(7.0, dtype=f64, device=cpu)
  select: f64[2] = aten.select.int(mul, 1, 1)
- fill_: f64[2] = aten.fill_.Tensor(select, lift_fresh_copy_1)
+ fill_: f64[2] = aten.fill_.Tensor(select, tensor_1)
  return mul""",
    )
    assert not list(gm.buffers())
    assert equal(gm(torch.ones(2, 2)), with_literals(torch.ones(2, 2)))


def test_attributes_that_are_read_or_written_stay() -> None:
    """Weights are no literals, and neither is a tensor that something else than a copy reads."""
    root, graph = nn.Module(), fx.Graph()
    root.register_buffer("table", torch.ones(3))
    table = graph.get_attr("table")
    copied = graph.call_function(torch.ops.aten.lift_fresh_copy.default, (table,))
    graph.output(graph.call_function(torch.ops.aten.add_.Tensor, (table, copied)))
    gm = fx.GraphModule(root, graph)
    assert WriteLiterals().apply(gm) == 0
    assert [name for name, _ in gm.named_buffers()] == ["table"]
