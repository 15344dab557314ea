"""`SplitUpdates` and `FuseUpdates`: residual updates by addcmul, and any number of them side by side, are found and cached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

from hero_fx.passes.normalize.fused_updates import FuseUpdates, SplitUpdates
from hero_fx.passes.render import graph_diff, op_count
from hero_fx.step_graphs import copy_graph

from .support import tiny, toys
from .support.tracing import Variants, equal, run_passes, trace

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def test_graph() -> None:
    before = trace(lambda x, g, f: torch.addcmul(x, g, f, value=0.5), *draw((2, 3, 5), (2, 1, 5), (2, 3, 5)))
    after = copy_graph(before)
    (record,) = run_passes(after, SplitUpdates())
    assert record.sites == 1
    assert_expected_inline(
        graph_diff(before, after),
        """\
  x_1: f32[2, 3, 5] = input
  g_1: f32[2, 1, 5] = input
  f_1: f32[2, 3, 5] = input
- addcmul: f32[2, 3, 5] = aten.addcmul.default(x_1, g_1, f_1, value=0.5)
- return addcmul
+ mul_tensor: f32[2, 1, 5] = aten.mul.Tensor(g_1, 0.5)
+ mul_tensor_1: f32[2, 3, 5] = aten.mul.Tensor(mul_tensor, f_1)
+ add_tensor: f32[2, 3, 5] = aten.add.Tensor(x_1, mul_tensor_1)
+ return add_tensor""",
    )
    run_passes(after, FuseUpdates())
    assert op_count(after) == op_count(before)


FUNCTIONS: dict[str, Any] = {
    "addcmul": lambda x, g, f: torch.addcmul(x, g, f),
    "value": lambda x, g, f: torch.addcmul(x, f, g, value=-1.7),
    "factor": lambda x, g, f: torch.add(x, f, alpha=0.3),
    "chain": lambda x, g, f: torch.addcmul(torch.addcmul(x, g, f), g, f, value=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_apart_and_together_again_is_the_same_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    values = draw((2, 3, 5), (2, 1, 5), (2, 3, 5), dtype=dtype)
    gm = trace(FUNCTIONS[name], *values)
    split, fused = run_passes(gm, SplitUpdates(), FuseUpdates())
    assert split.sites == fused.sites > 0
    assert equal(gm(*values), FUNCTIONS[name](*values))


def test_must_not_fire() -> None:
    def function(x: Tensor, scale: Tensor, y: Tensor) -> Any:
        return torch.addcmul(scale, x, y), torch.addcmul(x.double(), x, y.double()), x + y

    before = trace(function, *draw((2, 3, 5), (5,), (2, 3, 5)))
    after = copy_graph(before)
    (record,) = run_passes(after, SplitUpdates())
    assert (record.sites, graph_diff(before, after)) == (0, "")


class Fused(toys.ToyDiT):
    """The toy with updates by addcmul; `parallel` FFNs read the same value and are added one by one."""

    def __init__(self, form: str, parallel: int = 1) -> None:
        super().__init__(2)
        self.form, self.parallel = form, parallel
        self.more = torch.nn.ModuleList(torch.nn.Linear(toys.WIDTH, toys.WIDTH) for _ in range(2 * parallel))

    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        x, embedding = self.first(latents), F.silu(self.time(toys.sinusoid(timestep)))[:, None]
        for number, block in enumerate(self.blocks):
            assert isinstance(block, toys.Block)
            gate = block.modulation(embedding).chunk(6, dim=-1)[2]
            q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in block.qkv(F.layer_norm(x, (16,))).chunk(3, -1))
            x = self.update(x, gate, block.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
            normal = F.layer_norm(x, (16,))
            for i in range(self.parallel):
                x = self.update(x, gate, self.more[number * self.parallel + i](normal).relu())
        result: Tensor = self.last(x)
        return result

    def update(self, x: Tensor, gate: Tensor, f: Tensor) -> Tensor:
        match self.form:
            case "gate first":
                return torch.addcmul(x, gate, f)
            case "gate last":
                return torch.addcmul(x, f, gate)
            case "value":
                return torch.addcmul(x, gate, f, value=0.5)
            case "factor":
                return torch.add(x, gate * f, alpha=0.5)
            case "in place":
                return x.addcmul_(gate, f) if x.is_contiguous() else x
        return x + gate * f


FORMS = ["plain", "gate first", "gate last", "value", "factor", "in place"]


@pytest.mark.parametrize("form", FORMS)
def test_end_to_end(form: str) -> None:
    torch.manual_seed(0)
    model, start, times = tiny.randomized(Fused(form)), toys.latents(), toys.times(9)
    all_tokens: dict[str, Any] = {"refresh_layers": 1.0, "refresh_ratio": 1.0, "text": "live", "patch": (1, 1, 1)}
    variants = Variants(
        hero=toys.toy_backend(warmup=2, **all_tokens), fora=toys.toy_backend("fora", warmup=2, grid=None)
    )
    run = toys.torch_compile(model, variants, fullgraph=True)
    plain = toys.loop(model, start, times)
    for policy, backend in variants.backends.items():
        variants.now = policy
        ours = toys.loop(run, start, times)
        assert toys.same(ours[:2], plain[:2])
        assert backend.stats().cached_steps == 4
        steps = backend.graphs[-1]
        assert [b.kind for b in steps.structure.branches] == ["attention", "ffn"] * 2
        if policy == "hero":
            assert tiny.worst(ours, plain) < 1e-5
        else:  # what is left: embeddings, the gates of two layers, the head
            assert op_count(steps.cached[0], "aten.linear", "aten.scaled_dot_product_attention").total() == 5


@pytest.mark.parametrize("parallel", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 5)), 17])
def test_any_number_of_parallel_updates_is_found(parallel: int) -> None:
    torch.manual_seed(0)
    model = tiny.randomized(Fused("plain", parallel))
    run, backend = toys.compiled(model, policy="fora", grid=None)
    toys.loop(run, toys.latents(), toys.times(9))
    steps = backend.graphs[-1]
    assert len(steps.structure.branches) == 2 * (1 + parallel)
    assert op_count(steps.cached[0])["aten.scaled_dot_product_attention"] == 0
