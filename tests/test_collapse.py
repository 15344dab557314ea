"""The algebraic passes: diffs, where they must not fire, and the collapsed form against the literal one."""

from __future__ import annotations

from functools import cache
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import hero_fx
from hero_fx.passes.emit import value_of
from hero_fx.passes.pipeline import Pass, Pipeline
from hero_fx.passes.render import graph_diff, op_count, render
from hero_fx.passes.simplify.cleanup import DropDeadCode, DropUnreadState
from hero_fx.passes.simplify.common_subexpressions import CommonSubexpressions
from hero_fx.passes.simplify.merge import MergeCaches
from hero_fx.passes.simplify.scatters import ForwardGathers, SinkScatters
from hero_fx.passes.simplify.summands import find_merges
from hero_fx.passes.simplify.write_rows import WriteRows
from hero_fx.passes.slots import FeatureSlot, IndexSlot, ScalarSlot, StateSlot

from . import tiny

aten = torch.ops.aten
B, N, D, K = 2, 5, 3, 2


def graph(function: Any, **inputs: Tensor) -> GraphModule:
    """`function` as a normalised graph; inputs named s* are feature state, w* scalars, idx* selections."""
    gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs.values())
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node._rename(name)
        node.target = name
        if name.startswith("s"):
            node.meta["slot"] = FeatureSlot(name, "image")
        if name.startswith("w"):
            node.meta["slot"] = ScalarSlot("power", int(name[1:] or 1))
        if name.startswith("idx"):
            node.meta["slot"] = IndexSlot(None if name == "idx" else int(name[3:]))
    gm.recompile()
    return gm


def run(gm: GraphModule, *passes: Pass) -> tuple[int, str]:
    before = render(gm)
    records = Pipeline(label="test", passes=passes)(gm)
    return sum(r.sites for r in records), graph_diff(before, gm, context=0)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = {"x": (B, N, D), "s1": (B, N, D), "v": (B, K, D), "gate": (B, 1, D)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    return {"x": values["x"], "s1": values["s1"], "v": values["v"], "gate": values["gate"], "idx": torch.tensor([1, 4])}


def outputs(gm: GraphModule, inputs: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    """(result, inputs afterwards): passes must keep both."""
    copies = [t.clone() for t in inputs.values()]
    return gm(*copies), copies


def assert_same(before: GraphModule, after: GraphModule, inputs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(outputs(after, inputs), outputs(before, inputs), rtol=1e-6, atol=1e-6)


def block(x: Tensor, s1: Tensor, v: Tensor, gate: Tensor, idx: Tensor) -> Tensor:
    """A refreshed branch and the next branch's gather."""
    merged = torch.index_copy(s1, 1, idx, v)
    out = x + gate * merged
    s1.copy_(merged)
    return torch.index_select(out, 1, idx) * 2, out  # type: ignore[return-value]


class TestDiffs(expecttest.TestCase):
    def test_sink_scatters(self) -> None:
        _, diff = run(graph(block, **tensors()), SinkScatters(), DropDeadCode())
        self.assertExpectedInline(
            diff,
            """\
  ...
- mul: f32[2, 5, 3] = aten.mul.Tensor(gate, index_copy)
- add: f32[2, 5, 3] = aten.add.Tensor(x, mul)
+ mul_tensor: f32[2, 5, 3] = aten.mul.Tensor(gate, s1)
+ mul_tensor_1: f32[2, 2, 3] = aten.mul.Tensor(gate, v)
+ index_select_default: f32[2, 2, 3] = aten.index_select.default(x, 1, idx)
+ add_tensor: f32[2, 5, 3] = aten.add.Tensor(x, mul_tensor)
+ add_tensor_1: f32[2, 2, 3] = aten.add.Tensor(index_select_default, mul_tensor_1)
+ index_copy_default_1: f32[2, 5, 3] = aten.index_copy.default(add_tensor, 1, idx, add_tensor_1)
  ...
- index_select: f32[2, 2, 3] = aten.index_select.default(add, 1, idx)
+ index_select: f32[2, 2, 3] = aten.index_select.default(index_copy_default_1, 1, idx)
  ...
- return (mul_1, add)
+ return (mul_1, index_copy_default_1)""",
        )

    def test_forward_gathers(self) -> None:
        gm = graph(block, **tensors())
        run(gm, SinkScatters(), DropDeadCode())
        self.assertExpectedInline(
            run(gm, ForwardGathers())[1],
            """\
  ...
- index_select: f32[2, 2, 3] = aten.index_select.default(index_copy_default_1, 1, idx)
- mul_1: f32[2, 2, 3] = aten.mul.Tensor(index_select, 2)
+ mul_1: f32[2, 2, 3] = aten.mul.Tensor(add_tensor_1, 2)
  ...""",
        )

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

    def test_common_subexpressions(self) -> None:
        def twice(x: Tensor, idx: Tensor) -> Tensor:
            return torch.index_select(x, 1, idx) + torch.index_select(x, 1, idx) * 2

        inputs = {name: tensors()[name] for name in ("x", "idx")}
        self.assertExpectedInline(
            run(graph(twice, **inputs), CommonSubexpressions())[1],
            """\
  ...
- index_select_1: f32[2, 2, 3] = aten.index_select.default(x, 1, idx)
- mul: f32[2, 2, 3] = aten.mul.Tensor(index_select_1, 2)
+ mul: f32[2, 2, 3] = aten.mul.Tensor(index_select, 2)
  ...""",
        )

    def test_merge_caches(self) -> None:
        cached, full, merges = two_branches()
        self.assertExpectedInline(
            run(cached, MergeCaches(merges=merges))[1],
            """\
  ...
- s1: f32[2, 5, 3] = input
- s2: f32[2, 5, 3] = input
- s3: f32[2, 5, 3] = input
- s4: f32[2, 5, 3] = input
  ...
- mul: f32[2, 5, 3] = aten.mul.Tensor(s2, w)
- add: f32[2, 5, 3] = aten.add.Tensor(s1, mul)
+ sum_s1_image_y0: f32[2, 5, 3] = input
+ sum_s2_image_y0: f32[2, 5, 3] = input
+ mul: f32[2, 5, 3] = aten.mul.Tensor(sum_s2_image_y0, w)
+ add: f32[2, 5, 3] = aten.add.Tensor(sum_s1_image_y0, mul)
  ...
- mul_1: f32[2, 5, 3] = aten.mul.Tensor(s4, w)
- add_2: f32[2, 5, 3] = aten.add.Tensor(s3, mul_1)
- add_3: f32[2, 5, 3] = aten.add.Tensor(add_1, add_2)
- return add_3
+ return add_1""",
        )
        self.assertExpectedInline(
            run(full, MergeCaches(merges=merges), DropDeadCode())[1],
            """\
  ...
- s1: f32[2, 5, 3] = input
- s2: f32[2, 5, 3] = input
- s3: f32[2, 5, 3] = input
- s4: f32[2, 5, 3] = input
  ...
+ sum_s1_image_y0: f32[2, 5, 3] = input
+ sum_s2_image_y0: f32[2, 5, 3] = input
  ...
- sub: f32[2, 5, 3] = aten.sub.Tensor(sin, s1)
- mul: f32[2, 5, 3] = aten.mul.Tensor(sub, w)
- sub_1: f32[2, 5, 3] = aten.sub.Tensor(cos, s3)
- mul_1: f32[2, 5, 3] = aten.mul.Tensor(sub_1, w)
- copy_: f32[2, 5, 3] = aten.copy_.default(s1, sin)
- copy__1: f32[2, 5, 3] = aten.copy_.default(s2, mul)
- copy__2: f32[2, 5, 3] = aten.copy_.default(s3, cos)
- copy__3: f32[2, 5, 3] = aten.copy_.default(s4, mul_1)
+ sub_tensor: f32[2, 5, 3] = aten.sub.Tensor(add_1, x)
+ sub_tensor_1: f32[2, 5, 3] = aten.sub.Tensor(sub_tensor, sum_s1_image_y0)
+ mul_tensor: f32[2, 5, 3] = aten.mul.Tensor(sub_tensor_1, w)
+ copy__default: f32[2, 5, 3] = aten.copy_.default(sum_s1_image_y0, sub_tensor)
+ copy__default_1: f32[2, 5, 3] = aten.copy_.default(sum_s2_image_y0, mul_tensor)
  ...""",
        )

    def test_drop_unread_state(self) -> None:
        def record(x: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
            s1.copy_(x)
            s2.copy_(x * 2)
            return x + 1

        values = tensors()
        gm = graph(record, x=values["x"], s1=values["s1"], s2=values["s1"].clone())
        self.assertExpectedInline(
            run(gm, DropUnreadState(read=frozenset({FeatureSlot("s1", "image")})))[1],
            """\
  ...
- s2: f32[2, 5, 3] = input
  ...
- mul: f32[2, 5, 3] = aten.mul.Tensor(x, 2)
- copy__1: f32[2, 5, 3] = aten.copy_.default(s2, mul)
  ...""",
        )
        assert run(gm, DropUnreadState(read=frozenset({FeatureSlot("s1", "image")})))[0] == 0


def two_branches() -> tuple[GraphModule, GraphModule, Any]:
    """A cached and a full step of two extrapolated branches, and what can be merged in them."""

    def cached(x: Tensor, s1: Tensor, s2: Tensor, s3: Tensor, s4: Tensor, w: Tensor) -> Tensor:
        return x + (s1 + s2 * w) + (s3 + s4 * w)

    def full(x: Tensor, s1: Tensor, s2: Tensor, s3: Tensor, s4: Tensor, w: Tensor) -> Tensor:
        u = x.sin()
        y = x + u
        v = y.cos()
        z = y + v
        d1, d2 = (u - s1) * w, (v - s3) * w
        s1.copy_(u)
        s2.copy_(d1)
        s3.copy_(v)
        s4.copy_(d2)
        return z

    inputs = merge_inputs()
    graphs = graph(cached, **inputs), graph(full, **inputs)
    families = [
        (FeatureSlot("s1", "image"), FeatureSlot("s2", "image")),
        (FeatureSlot("s3", "image"), FeatureSlot("s4", "image")),
    ]
    return *graphs, find_merges([graphs[0]], families)


def merge_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(B, N, D, generator=generator) for name in ("x", "s1", "s2", "s3", "s4")}
    return inputs | {"w": torch.tensor(0.5)}


@pytest.mark.parametrize(
    "passes",
    [
        (CommonSubexpressions(),),
        (SinkScatters(),),
        (SinkScatters(), ForwardGathers()),
        (SinkScatters(), ForwardGathers(), CommonSubexpressions(), DropDeadCode(), WriteRows()),
        (WriteRows(),),
    ],
    ids=lambda passes: "-".join(p.name for p in passes),
)
def test_rewrites_keep_results_and_state(passes: tuple[Pass, ...]) -> None:
    before, after = graph(block, **tensors()), graph(block, **tensors())
    run(after, *passes)
    assert_same(before, after, tensors())


def test_merged_caches_keep_results() -> None:
    cached, full, merges = two_branches()
    inputs = merge_inputs()
    z = outputs(full, inputs)[0]
    plain = outputs(cached, inputs)[0]
    for gm in (cached, full):
        run(gm, MergeCaches(merges=merges), DropDeadCode())
    sums = {"x": inputs["x"], "w": inputs["w"], "m1": inputs["s1"] + inputs["s3"], "m2": inputs["s2"] + inputs["s4"]}
    torch.testing.assert_close(cached(*sums.values()), plain)
    result, after = outputs(full, sums)
    torch.testing.assert_close(result, z)
    # Recorded sums are the sums of what was recorded.
    u, y = inputs["x"].sin(), inputs["x"] + inputs["x"].sin()
    torch.testing.assert_close(after[2], u + y.cos())
    torch.testing.assert_close(after[3], (u + y.cos() - sums["m1"]) * 0.5)


def must_not_fire(function: Any, one: Pass, **inputs: Tensor) -> None:
    sites, diff = run(graph(function, **inputs), one)
    assert (sites, diff) == (0, "")


def test_scatter_stays_where_indices_differ() -> None:
    def two(x: Tensor, s1: Tensor, v: Tensor, idx: Tensor, idx1: Tensor) -> Tensor:
        return torch.index_copy(x, 1, idx, v) + torch.index_copy(s1, 1, idx1, v)

    values = tensors()
    inputs = {n: values[n] for n in ("x", "s1", "v", "idx")} | {"idx1": torch.tensor([0, 2])}
    must_not_fire(two, SinkScatters(), **inputs)


def test_scatter_stays_where_nothing_gathers() -> None:
    def last(x: Tensor, s1: Tensor, v: Tensor, idx: Tensor) -> Tensor:
        return x + torch.index_copy(s1, 1, idx, v)

    must_not_fire(last, SinkScatters(), **{n: tensors()[n] for n in ("x", "s1", "v", "idx")})


def test_gather_stays_where_axes_differ() -> None:
    def across(x: Tensor, v: Tensor, idx: Tensor) -> Tensor:
        return torch.index_select(torch.index_copy(x, 1, idx, v), 2, idx)

    values = tensors()
    idx = torch.tensor([0, 2])
    must_not_fire(across, ForwardGathers(), x=values["x"], v=values["v"], idx=idx)


def test_rows_are_not_written_before_a_later_reader() -> None:
    def late(s1: Tensor, v: Tensor, idx: Tensor) -> Tensor:
        merged = torch.index_copy(s1, 1, idx, v)
        out = merged.sin() + s1.cos()  # reads the old state behind the scatter
        s1.copy_(merged)
        return out

    must_not_fire(late, WriteRows(), **{n: tensors()[n] for n in ("s1", "v", "idx")})


def test_random_ops_are_not_shared() -> None:
    def noise(x: Tensor) -> Tensor:
        return x + torch.rand_like(x) + torch.rand_like(x)

    must_not_fire(noise, CommonSubexpressions(), x=tensors()["x"])


@pytest.mark.parametrize("how", ["slice", "diagonal", "out", "of the view that is read"])
def test_nothing_is_shared_across_a_write(how: str) -> None:
    def around(x: Tensor, v: Tensor) -> Tensor:
        part = x[0] if how == "of the view that is read" else x
        before = part.sin()
        if how == "slice":
            x[:, 1:3].copy_(v)
        elif how == "diagonal":
            x[0, :3].diagonal().add_(1)
        elif how == "out":
            torch.cos(v, out=x[:, :2])
        else:
            x.mul_(2)
        return before + part.sin()

    inputs = {n: tensors()[n] for n in ("x", "v")}
    must_not_fire(around, CommonSubexpressions(), **inputs)


def test_writes_elsewhere_do_not_matter_and_equals_behind_one_are_shared() -> None:
    def around(x: Tensor, v: Tensor) -> Tensor:
        before = x.sin()
        v[:, 0].zero_()
        same = x.sin()
        x[:, 0].zero_()
        return before + same + x.sin() + x.sin()

    inputs = {n: tensors()[n] for n in ("x", "v")}
    gm, before = graph(around, **inputs), graph(around, **inputs)
    assert run(gm, CommonSubexpressions())[0] == 2
    assert_same(before, gm, inputs)


def test_results_that_are_written_or_returned_both_are_not_shared() -> None:
    def written(x: Tensor) -> Tensor:
        a, b = x[0].sin(), x[0].sin()
        a.diagonal().zero_()
        return a + b

    def returned(x: Tensor) -> Any:
        a, b = x.sin(), x.sin()
        return a, b[0]

    for function in (written, returned):
        gm, inputs = graph(function, x=tensors()["x"]), {"x": tensors()["x"]}
        run(gm, CommonSubexpressions())
        assert op_count(gm, "aten.sin")["aten.sin"] == 2
        assert_same(graph(function, **inputs), gm, inputs)


def test_regions_of_autocast_are_not_shared_across() -> None:
    def mixed(x: Tensor) -> Tensor:
        a = x @ x.mT
        with torch.autocast("cpu", torch.bfloat16):
            b = x @ x.mT
        return a + b

    gm = graph(mixed, x=tensors()["x"])
    run(gm, CommonSubexpressions())
    assert op_count(gm, "aten.matmul")["aten.matmul"] == 2


@pytest.mark.parametrize("one", [SinkScatters(), ForwardGathers(), WriteRows()], ids=lambda p: p.name)
@pytest.mark.parametrize("dim", [1, -2])
def test_scatters_by_an_index_of_the_models_own_stay(one: Pass, dim: int) -> None:
    """Its indices may repeat, and its axis may be counted from the right: rows of x would not be those of the table."""

    def own(x: Tensor, s1: Tensor, v: Tensor, gate: Tensor, own: Tensor) -> Tensor:
        merged = torch.index_copy(s1, dim, own, v)
        out = x + gate * merged
        gathered = torch.index_select(merged, dim, own) + torch.index_select(out, dim, own)
        s1.copy_(merged)
        return gathered

    values = tensors()
    inputs = {n: values[n] for n in ("x", "s1", "v", "gate")} | {"own": torch.tensor([2, 2])}
    must_not_fire(own, one, **inputs)


def test_scatters_that_the_model_writes_to_stay() -> None:
    def written(x: Tensor, s1: Tensor, v: Tensor, gate: Tensor, idx: Tensor) -> Any:
        merged = torch.index_copy(s1, 1, idx, v)
        out = x + gate * merged
        out[0, :3].diagonal().add_(1)  # has no functional form
        rows = torch.index_select(out, 1, idx)
        s1.copy_(merged)
        return rows, out

    inputs = tensors()
    before, after = graph(written, **inputs), graph(written, **inputs)
    run(after, SinkScatters(), ForwardGathers(), DropDeadCode(), WriteRows())
    assert op_count(after, "aten.index_select")["aten.index_select"] == 1
    assert_same(before, after, inputs)


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


def test_a_sum_of_caches_alone_is_not_the_state() -> None:
    """The sum is returned, and the state it would be is written to at the next step."""

    def cached(s1: Tensor, s2: Tensor) -> Tensor:
        return s1 + s2

    gm = graph(cached, **{n: merge_inputs()[n] for n in ("s1", "s2")})
    merges = find_merges([gm], [(FeatureSlot("s1", "image"),), (FeatureSlot("s2", "image"),)])
    assert run(gm, MergeCaches(merges=merges))[0] == 1
    state = torch.ones(B, N, D)
    out = gm(state)
    state.zero_()
    assert torch.equal(out, torch.ones(B, N, D))


@pytest.mark.parametrize("case", ["live gate", "read between", "other weight"])
def test_caches_are_not_merged(case: str) -> None:
    def cached(x: Tensor, s1: Tensor, s2: Tensor, w: Tensor, gate: Tensor) -> Any:
        if case == "live gate":
            return x + gate * s1 + gate * s2
        if case == "read between":
            between = x + s1
            return between + s2, between.sin()
        return x + s1 * w + s2

    values = tensors()
    inputs = {"x": values["x"], "s1": values["s1"], "s2": values["s1"].clone(), "w": torch.tensor(2.0)}
    gm = graph(cached, **inputs, gate=values["gate"])
    merges = find_merges([gm], [(FeatureSlot("s1", "image"),), (FeatureSlot("s2", "image"),)])
    # One sum with one leaf in front of `between` is still a sum; what matters is that s1 and s2 do not become one.
    assert merges == ()
    assert MergeCaches(merges=merges).apply(gm) == 0


OPTIONS: list[dict[str, Any]] = [
    {},
    {"unsampled": "reuse"},
    {"policy": "lean"},
    {"text": "live"},
    {"unsampled": "extrapolate", "cache_point": "pre_gate"},
    {"unsampled": "gate", "keys": "landmarks"},
    {"unsampled": "gate", "state_dtype": torch.bfloat16},
    {"selection": "per_layer"},
    {"keys": "sampled+text"},
    {"policy": "fora", "cache_point": "post_gate"},
    {"policy": "taylorseer", "order": 2, "cache_point": "post_gate"},
    {"policy": "duca", "cache_point": "post_gate"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_collapsed_equals_literal_over_fifty_steps(options: dict[str, Any]) -> None:
    results = []
    for form in ("literal", "collapsed"):
        backend = hero_fx.backend(inner=tiny.INNER, num_steps=50, interval=3, form=form, **options)
        results.append(tiny.denoise(tiny.captured().compiled(backend), tiny.inputs(), tiny.timesteps(50)))
    # Sums of rounded caches are not rounded sums of caches: with state in bf16 the forms agree to its precision.
    assert tiny.worst(results[1], results[0]) < (1e-5 if "state_dtype" not in options else 1e-2)


@cache
def traced(layers: int) -> hero_fx.StepGraphs:
    captured = tiny.captured(layers=layers)
    with torch.no_grad():
        return hero_fx.backend().trace(captured.gm, captured.inputs)


@cache
def steps_of(layers: int, **options: Any) -> hero_fx.StepGraphs:
    """The step graphs of a tiny model, which tests share and none of them changes."""
    return hero_fx.backend(**options).rewrite(traced(layers))


@pytest.mark.parametrize("layers", [6, 12])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=["default", "reuse"])
def test_cached_step_gathers_and_scatters_once(options: dict[str, Any], layers: int) -> None:
    steps = steps_of(layers, **options)
    cached = steps.cached[0]
    reuse = bool(options)
    # The stream, and the two rotary tables; the slopes of the sampled tokens' lines, of all shallow layers in one.
    assert op_count(cached, "aten.index_select")["aten.index_select"] == (3 if reuse else 4)
    assert op_count(cached, "aten.index_copy")["aten.index_copy"] == 1
    assert op_count(cached, "aten.copy_")["aten.copy_"] == 0
    shallow = layers // 2
    # Full-size work on the stream: the sums of the shallow and of the deep lines (3 each) and the modulation of the last norm
    # (2). Caches in front of the gate cannot be summed: gate * cache and the sum, of attention and of FFN, per shallow layer.
    tokens = steps.structure.image_tokens
    full_size = [n for n in cached.graph.nodes if n.op == "call_function" and _tokens(n) == tokens]
    streams = [n for n in full_size if n.target in (aten.mul.Tensor, aten.add.Tensor)]
    assert len(streams) <= (4 * shallow + 5 if reuse else 8)
    sampled = op_count(cached, "aten.linear")["aten.linear"]
    assert sampled == op_count(steps.normal, "aten.linear")["aten.linear"] - 6 * (layers - shallow) - 2 * (
        layers - shallow
    )


def _tokens(node: torch.fx.Node) -> int:
    value = value_of(node)
    return value.shape[1] if isinstance(value, Tensor) and value.dim() == 3 else 0


@pytest.mark.parametrize("layers", [6, 12])
def test_state_by_depth(layers: int) -> None:
    hidden = 2 * 72 * 32 * 4
    lean = steps_of(layers, policy="lean")
    assert lean.state_bytes == 3 * hidden
    assert steps_of(layers, policy="lean", order=0).state_bytes == 2 * hidden
    assert len(steps_of(layers, policy="fora", cache_point="post_gate").state) == 1
    assert len(steps_of(layers, policy="taylorseer", order=2, cache_point="post_gate").state) == 3
    default = steps_of(layers)  # features and their differences of either half, keys and values of each shallow layer
    assert len(default.state) == 4 + 2 * (layers // 2)
    assert len(steps_of(layers, unsampled="reuse").state) == 2 + 4 * (layers // 2)


@pytest.mark.parametrize("layers", [6, 12])
def test_state_of_the_gate_correction_by_depth(layers: int) -> None:
    """Two tensors for all shallow layers and two for all deep ones; per layer keys, and gates of one token."""
    shallow, width, heads = layers // 2, 32, 2
    hidden = 2 * 72 * width * 4
    gates = 2 * shallow * 2 * width * 4
    for keys, tokens in (("sampled", 0), ("landmarks", 12 + 7), ("all", 72 + 7)):
        steps = steps_of(layers, unsampled="gate", keys=keys)
        assert steps.state_bytes == 4 * hidden + gates + 2 * shallow * (2 * heads * tokens * 16 * 4)
    assert steps_of(layers, keys="sampled").state_bytes == 4 * hidden


@pytest.mark.parametrize("options", OPTIONS[:3], ids=["default", "reuse", "lean"])
def test_each_state_tensor_is_read_once(options: dict[str, Any]) -> None:
    (cached,) = steps_of(6, **options).cached
    for node in cached.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("slot"), StateSlot):
            readers = [u for u in node.users if u.target is not aten.index_copy_.default]
            # A line's slope is read a second time at the sampled rows, whose line starts anew from what was computed.
            rows = [u for u in readers if u.target is aten.index_select.default]
            assert len(readers) - len(rows) == 1, node.name
            assert not rows or options == {}, node.name
