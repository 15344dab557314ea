"""Autocast: regions become casts, and cached steps compute in the dtypes in which full steps do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from hero_fx.passes import compat
from hero_fx.passes.normalize.autocast import ResolveAutocast
from hero_fx.passes.normalize.trace import normalize
from hero_fx.passes.render import graph_diff, render
from hero_fx.step_graphs import copy_graph

from .support import tiny, toys
from .support.tracing import capture, equal, normal_form, run_passes

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BF16 = torch.bfloat16


def on(enabled: bool = True, dtype: torch.dtype | None = BF16) -> Any:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def traced(function: Callable[..., Any], *values: Any) -> Any:
    return normalize(*capture(function, *values))


def applied(function: Callable[..., Any], *values: Any) -> tuple[Any, Any, int]:
    before = traced(function, *values)
    after = copy_graph(before)
    (record,) = run_passes(after, ResolveAutocast())
    return before, after, record.sites


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def nested(x: Tensor, w: Tensor) -> Any:
    """A region within another, that is off; behind it the outer one is on again."""
    with on():
        y = F.linear(x, w)
        with on(enabled=False):
            z = F.linear(y.float(), w)
        y = F.linear(z.relu(), w)
    return F.linear(y.float(), w)


def test_graph() -> None:
    before, after, sites = applied(nested, *draw((2, 3, 5), (5, 5)))
    assert sites == 4  # two regions, and two products within: the third is in one that is off
    assert_expected_inline(
        graph_diff(before, after),
        """\
  x: f32[2, 3, 5] = input
  w: f32[5, 5] = input
- _enter_autocast = torch.amp.autocast_mode._enter_autocast('cpu', bf16, True, False)
- linear: bf16[2, 3, 5] = aten.linear.default(x, w)
- _enter_autocast_1 = torch.amp.autocast_mode._enter_autocast('cpu', bf16, False, False)
+ to_dtype: bf16[2, 3, 5] = aten.to.dtype(x, bf16)
+ to_dtype_1: bf16[5, 5] = aten.to.dtype(w, bf16)
+ linear: bf16[2, 3, 5] = aten.linear.default(to_dtype, to_dtype_1)
  to: f32[2, 3, 5] = aten.to.dtype(linear, f32)
  linear_1: f32[2, 3, 5] = aten.linear.default(to, w)
- _exit_autocast = torch.amp.autocast_mode._exit_autocast(_enter_autocast_1)
  relu: f32[2, 3, 5] = aten.relu.default(linear_1)
- linear_2: bf16[2, 3, 5] = aten.linear.default(relu, w)
- _exit_autocast_1 = torch.amp.autocast_mode._exit_autocast(_enter_autocast)
+ to_dtype_2: bf16[2, 3, 5] = aten.to.dtype(relu, bf16)
+ to_dtype_3: bf16[5, 5] = aten.to.dtype(w, bf16)
+ linear_2: bf16[2, 3, 5] = aten.linear.default(to_dtype_2, to_dtype_3)
  to_1: f32[2, 3, 5] = aten.to.dtype(linear_2, f32)
  linear_3: f32[2, 3, 5] = aten.linear.default(to_1, w)
  return (linear_3,)""",
    )


def test_what_autocast_leaves_alone_is_left_alone() -> None:
    def function(x: Tensor, w: Tensor) -> Any:
        with on():
            return F.layer_norm((x + w[0]).relu(), (5,)).reshape(-1, 5)

    assert_expected_inline(
        graph_diff(*applied(function, *draw((2, 3, 5), (5, 5)))[:2]),
        """\
  w: f32[5, 5] = input
  x: f32[2, 3, 5] = input
- _enter_autocast = torch.amp.autocast_mode._enter_autocast('cpu', bf16, True, False)
  select: f32[5] = aten.select.int(w, 0, 0)
  add: f32[2, 3, 5] = aten.add.Tensor(x, select)
  relu: f32[2, 3, 5] = aten.relu.default(add)
  layer_norm: f32[2, 3, 5] = aten.layer_norm.default(relu, [5])
  reshape: f32[6, 5] = aten.reshape.default(layer_norm, [-1, 5])
- _exit_autocast = torch.amp.autocast_mode._exit_autocast(_enter_autocast)
  return (reshape,)""",
    )
    _, after, sites = applied(lambda x, w: F.linear(x, w), *draw((2, 3, 5), (5, 5)))
    assert (sites, "to" in render(after)) == (0, False)


def test_an_op_of_which_a_part_casts_is_written_out() -> None:
    def function(x: Tensor, w: Tensor) -> Any:
        with on():
            return torch.einsum("bnd,ed->bne", x, w)

    assert_expected_inline(
        render(applied(function, *draw((2, 3, 5), (5, 5)))[1]),
        """\
x: f32[2, 3, 5] = input
w: f32[5, 5] = input
unsqueeze: f32[2, 3, 5, 1] = aten.unsqueeze.default(x, 3)
permute: f32[2, 3, 1, 5] = aten.permute.default(unsqueeze, [0, 1, 3, 2])
unsqueeze_1: f32[5, 5, 1] = aten.unsqueeze.default(w, 2)
unsqueeze_2: f32[5, 5, 1, 1] = aten.unsqueeze.default(unsqueeze_1, 3)
permute_1: f32[1, 1, 5, 5] = aten.permute.default(unsqueeze_2, [2, 3, 0, 1])
permute_2: f32[2, 3, 5, 1] = aten.permute.default(permute, [0, 1, 3, 2])
view: f32[1, 6, 5] = aten.view.default(permute_2, [1, 6, 5])
permute_3: f32[5, 5, 1, 1] = aten.permute.default(permute_1, [3, 2, 0, 1])
view_1: f32[1, 5, 5] = aten.view.default(permute_3, [1, 5, 5])
_to_copy: bf16[1, 5, 5] = aten._to_copy.default(view_1, dtype=bf16)
_to_copy_1: bf16[1, 6, 5] = aten._to_copy.default(view, dtype=bf16)
bmm: bf16[1, 6, 5] = aten.bmm.default(_to_copy_1, _to_copy)
view_2: bf16[2, 3, 1, 5] = aten.view.default(bmm, [2, 3, 1, 5])
permute_4: bf16[2, 3, 5, 1] = aten.permute.default(view_2, [0, 1, 3, 2])
view_3: bf16[2, 3, 5] = aten.view.default(permute_4, [2, 3, 5])
return (view_3,)""",
    )


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "nested": nested,
    "einsum": lambda x, w: torch.einsum("bnd,ed->bne", x, w),
    "same tensor twice": lambda x, w: x @ x.transpose(1, 2) @ x,
    "matmul by itself": lambda x, w: w @ w,
    "attention with a mask": lambda x, w: F.scaled_dot_product_attention(x[None], x[None], x[None], x @ x.mT),
    "widest": lambda x, w: torch.cat([x, F.linear(x, w)], 1),
    "index_copy": lambda x, w: F.linear(x, w).float().index_copy(1, torch.tensor([1]), F.linear(x, w)[:, 1:2].float()),
    "float32 only": lambda x, w: F.mse_loss(F.linear(x, w), F.linear(x, w).relu(), reduction="none"),
    "split": lambda x, w: [part.relu() for part in F.linear(x, w).split(2, dim=-1)],
    "written into": lambda x, w: F.linear(x, w).add_(x),
    "view written into": lambda x, w: (y := torch.einsum("bnd,ed->bne", x, w), y[:, 1:].mul_(2), y)[2],
    "grouped convolution": lambda x, w: F.conv1d(x, x[0, :, :1, None].expand(3, 1, 1), groups=3),
    "float16": lambda x, w: F.linear(x, w).to(torch.float16),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
def test_numerics(name: str, around: bool) -> None:
    """Bit for bit what the function gives, with the region in it or around the call."""
    values, function = draw((2, 3, 5), (5, 5)), FUNCTIONS[name]

    def inside(x: Tensor, w: Tensor) -> Any:
        with on():
            return function(x, w)

    with on(enabled=around):
        normal = normal_form(function if around else inside, *values)
    assert "autocast" not in render(normal)
    given = dict(zip("xw", values, strict=True))
    inputs = [given[node.name] for node in normal.graph.find_nodes(op="placeholder")]
    assert equal(normal(*inputs), inside(*values))


def test_a_body_that_would_autocast_is_refused() -> None:
    def function(x: Tensor, w: Tensor) -> Any:
        with on():
            return torch.cond(x.sum() > 0, lambda x, w: F.linear(x, w), lambda x, w: x @ w, (x, w))

    with pytest.raises(ValueError, match=r"aten\.linear\.default in the body of cond runs under autocast"):
        applied(function, *draw((2, 3, 5), (5, 5)))
    assert not torch.is_autocast_enabled("cpu"), "what is raised closes the regions"


# -- end to end


class Autocasting(toys.ToyDiT):
    """Blocks in a region, their norms and gates out of it, or the whole model in one."""

    def __init__(self, layers: int, where: str) -> None:
        super().__init__(layers)
        self.where = where

    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        if self.where == "whole":
            with on():
                return super().forward(latents, timestep).float()
        weights = self.first.weight.dtype
        embedding = F.silu(self.time(toys.sinusoid(timestep).to(weights)))[:, None]
        x = self.first(latents.to(weights)).float()
        for block in self.blocks:
            assert isinstance(block, toys.Block)
            x = self.block(block, x, embedding)
        result: Tensor = self.last(F.layer_norm(x, (toys.WIDTH,)).to(weights)).float()
        return result

    def block(self, block: toys.Block, x: Tensor, embedding: Tensor) -> Tensor:
        with on(enabled=self.where == "layers"):
            modulation = block.modulation(embedding).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        normal = F.layer_norm(x, (toys.WIDTH,)) * (1 + scale1) + shift1
        with on():
            q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in block.qkv(normal).chunk(3, dim=-1))
            with on(enabled=False):
                q = q.float() * 1.5
            attended = block.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + gate1 * attended
        normal = F.layer_norm(x, (toys.WIDTH,)) * (1 + scale2) + shift2
        with on():
            result: Tensor = x + gate2 * block.down(F.gelu(block.up(normal)))
        return result


def autocasting(where: str, weights: torch.dtype) -> Any:
    torch.manual_seed(0)
    return tiny.randomized(Autocasting(2, where)).to(weights)


def products(gm: Any) -> list[torch.dtype]:
    return [node.meta["val"].dtype for node in gm.graph.nodes if "linear" in str(node.target)]


CASES = [
    ("hero", "layers", torch.float32),
    ("lean", "whole", BF16),
    ("duca", "whole", torch.float32),
    ("taylorseer", "layers but modulation", torch.float32),
    pytest.param("hero", "layers but modulation", BF16, marks=pytest.mark.exhaustive),
    pytest.param("duca", "layers", BF16, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("policy", "where", "weights"), CASES)
def test_full_and_cached_steps_compute_in_the_same_dtypes(policy: str, where: str, weights: torch.dtype) -> None:
    model, start, times = autocasting(where, weights), toys.latents(), toys.times(9)
    options: dict[str, Any] = {"refresh_layers": 1.0} if policy in ("hero", "lean") else {}
    options |= {} if policy in ("hero", "lean", "duca") else {"grid": None}
    run, backend = toys.compiled(model, policy=policy, **options)
    ours = toys.loop(run, start, times)
    stats = backend.stats()
    assert (stats.full_steps, stats.cached_steps) == (5, 4)
    plain = toys.loop(model, start, times)
    assert toys.same(ours[:2], plain[:2])
    assert tiny.worst(ours, plain) < 0.5
    steps = backend.graphs[-1]
    assert set(products(steps.cached[0])) <= set(products(steps.full))
    if where == "whole":
        assert set(products(steps.cached[0])) == {BF16}


@pytest.mark.parametrize(
    ("where", "weights", "inner"),
    [
        ("layers", BF16, "aot_eager"),
        ("around", torch.float32, "aot_eager"),
        pytest.param("whole", torch.float32, "aot_eager", marks=pytest.mark.exhaustive),
        pytest.param("layers", torch.float32, "aot_eager", marks=pytest.mark.exhaustive),
        pytest.param("around", torch.float32, "eager", marks=pytest.mark.exhaustive),
    ],
)
def test_refresh_of_all_tokens_is_full_compute(where: str, weights: torch.dtype, inner: str) -> None:
    model = toys.toy().to(weights) if where == "around" else autocasting(where, weights)
    start, times = toys.latents(), toys.times(7)
    if where == "around":
        start = start.to(weights)
    every: dict[str, Any] = {"refresh_layers": 1.0, "refresh_ratio": 1.0, "text": "live", "patch": (1, 1, 1)}
    with on(enabled=where == "around"):
        run, backend = toys.compiled(model, inner=inner, **every)
        ours, plain = toys.loop(run, start, times), toys.loop(model, start, times)
        assert backend.stats().cached_steps
        assert tiny.worst(ours, plain) < 0.03  # of bfloat16
        (cached,) = backend.graphs[-1].cached
        assert sorted(map(str, products(cached))) == sorted(map(str, products(backend.graphs[-1].full)))


# -- generated

REGION = st.sampled_from([None, True, False])
MODEL = st.lists(st.tuples(REGION, REGION, REGION, st.booleans()), min_size=2, max_size=2)


class Drawn(toys.ToyDiT):
    """Each part of a layer in a region of its own, nested or not."""

    def __init__(self, plan: list[tuple[Any, ...]]) -> None:
        super().__init__(len(plan))
        self.plan = plan

    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        x, embedding = self.first(latents), F.silu(self.time(toys.sinusoid(timestep)))[:, None]
        for (attention, projection, ffn, outer), block in zip(self.plan, self.blocks, strict=True):
            assert isinstance(block, toys.Block)
            with on(enabled=outer):
                with region(attention):
                    normal = F.layer_norm(x.float(), (toys.WIDTH,)) * (1 + embedding)
                    q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in block.qkv(normal).chunk(3, dim=-1))
                    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                with region(projection):
                    x = x + block.out(out.float())
                with region(ffn):
                    x = x + embedding * block.down(F.gelu(block.up(F.layer_norm(x, (toys.WIDTH,)))).float())
        result: Tensor = self.last(x)
        return result


def region(enabled: bool | None) -> Any:
    """A region, or none of its own."""
    return nn.Identity().eval() and (compat.autocast(()) if enabled is None else on(enabled))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(MODEL, st.sampled_from(["hero", "fora"]))
def test_drawn_regions(plan: list[tuple[Any, ...]], policy: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = tiny.randomized(Drawn(plan))
    start, times = toys.latents(), toys.times(7)
    every: dict[str, Any] = {"refresh_layers": 1.0, "refresh_ratio": 1.0, "text": "live", "patch": (1, 1, 1)}
    run, backend = toys.compiled(model, policy=policy, **(every if policy == "hero" else {"grid": None}))
    plain = toys.loop(model, start, times)
    ours = toys.loop(run, start, times)
    assert toys.same(ours[:2], plain[:2])
    assert backend.stats().cached_steps == 3
    assert policy == "fora" or tiny.worst(ours, plain) < 0.03
