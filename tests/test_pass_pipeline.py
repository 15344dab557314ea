"""`hero_fx.passes.pipeline`: order, records, errors, logs and dumps, with passes made for the purpose."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch._logging import _internal
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hero_fx.passes import pipeline
from hero_fx.passes.pipeline import Pass, PassError, Pipeline
from hero_fx.passes.render import render

aten = torch.ops.aten
LOGGER = "hero_fx.passes.pipeline"


@dataclass(frozen=True)
class Swap:
    """Replaces the target of every call of `old`."""

    name: str
    old: Callable[..., Any]
    new: Callable[..., Any]

    def apply(self, gm: fx.GraphModule) -> int:
        nodes = gm.graph.find_nodes(op="call_function", target=self.old)
        for node in nodes:
            node.target = self.new
        return len(nodes)


@dataclass(frozen=True)
class Do:
    """Runs a function on the graph, says what it is told to say."""

    name: str
    action: Callable[[fx.GraphModule], object] = field(default=lambda gm: None)
    sites: int = 0

    def apply(self, gm: fx.GraphModule) -> int:
        self.action(gm)
        return self.sites


SIN = Swap("relu_to_sin", aten.relu.default, aten.sin.default)
COS = Swap("sin_to_cos", aten.sin.default, aten.cos.default)


def graph() -> fx.GraphModule:
    def function(x: Tensor) -> Tensor:
        return x.relu() + x.relu()

    with FakeTensorMode():
        return make_fx(function, pre_dispatch=True)(torch.empty(2, 3))


def call(*passes: Pass) -> tuple[pipeline.PassRecord, ...]:
    return Pipeline(label="full", passes=passes)(graph())


def fail(error: Exception) -> Callable[[fx.GraphModule], object]:
    def action(gm: fx.GraphModule) -> object:
        raise error

    return action


def add_unused_call(gm: fx.GraphModule) -> None:
    x = gm.graph.find_nodes(op="placeholder")[0]
    with gm.graph.inserting_after(x):
        gm.graph.call_function(aten.neg.default, (x,))


def use_before_definition(gm: fx.GraphModule) -> None:
    first, second = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    first.args = (second,)


@pytest.fixture(autouse=True)
def trace_log(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """PyTorch's log behind TORCH_TRACE as a fresh process has it, out of reach of pytest, which would listen to it."""
    log = logging.Logger("trace")
    log.addHandler(_internal.LazyTraceHandler(None))
    monkeypatch.setattr(_internal, "trace_log", log)
    return log


@pytest.fixture
def renders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every render that the pipeline makes during the test."""
    made: list[str] = []

    def keep(gm: fx.GraphModule) -> str:
        made.append(render(gm))
        return made[-1]

    monkeypatch.setattr(pipeline, "render", keep)
    return made


@pytest.fixture
def artifacts(trace_log: logging.Logger) -> dict[str, str]:
    """Artifacts that reach TORCH_TRACE during the test, by name."""
    kept: dict[str, str] = {}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            values = vars(record)
            kept[values["metadata"]["artifact"]["name"]] = values["payload"]

    trace_log.handlers = [Keep()]
    return kept


def test_passes_run_in_order_on_a_recompiled_graph() -> None:
    x, gm = torch.randn(2, 3), graph()
    Pipeline(label="full", passes=(SIN, COS))(gm)
    torch.testing.assert_close(gm(x), 2 * x.cos())


def test_one_record_per_pass() -> None:
    first, second, third = call(Do("nothing"), SIN, Do("more", add_unused_call, sites=1))
    assert [r.name for r in (first, second, third)] == ["nothing", "relu_to_sin", "more"]
    assert {r.pipeline for r in (first, second, third)} == {"full"}
    assert [r.sites for r in (first, second, third)] == [0, 2, 1]
    assert dict(first.op_delta) == {}
    assert dict(second.op_delta) == {"aten.relu": -2, "aten.sin": 2}
    assert dict(third.op_delta) == {"aten.neg": 1}
    assert [(r.nodes_before, r.nodes_after) for r in (first, second, third)] == [(5, 5), (5, 5), (5, 6)]
    assert all(r.seconds >= 0 for r in (first, second, third))


def test_a_pass_that_does_nothing_leaves_the_compiled_code_alone() -> None:
    gm = graph()
    code = gm.forward.__code__
    Pipeline(label="full", passes=(Do("nothing"),))(gm)
    assert gm.forward.__code__ is code


def test_no_passes_no_records() -> None:
    assert call() == ()


def test_failure_names_the_pass_and_those_before_it() -> None:
    error = KeyError("q")
    with pytest.raises(PassError) as caught:
        call(SIN, COS, Do("split", fail(error)), Do("never"))
    assert_expected_inline(
        str(caught.value),
        """Pass `split` (3 of 4 in pipeline `full`, after `relu_to_sin`, `sin_to_cos`): KeyError: 'q'""",
    )
    assert caught.value.__cause__ is error


def test_failure_of_the_first_pass() -> None:
    with pytest.raises(PassError, match=re.escape("`split` (1 of 1 in pipeline `full`, after no other)")):
        call(Do("split", fail(RuntimeError("no"))))


def test_user_error_stays_a_value_error_and_gets_a_note() -> None:
    error = ValueError("interval=0: must be at least 1.")
    with pytest.raises(ValueError, match="interval=0") as caught:
        call(SIN, Do("split", fail(error)))
    assert caught.value is error
    assert_expected_inline(
        "\n".join(caught.value.__notes__),
        """Raised by pass `split` (2 of 2 in pipeline `full`, after `relu_to_sin`).""",
    )


def test_a_graph_that_does_not_lint_is_a_failure() -> None:
    with pytest.raises(PassError, match="`break`") as caught:
        call(Do("break", use_before_definition, sites=1))
    assert "was used before it has been defined" in str(caught.value)


def test_zero_sites_promise_an_untouched_graph() -> None:
    with pytest.raises(PassError, match=r"`liar`.* it returned 0 but changed the graph"):
        call(Do("liar", add_unused_call, sites=0))


def test_info_logs_one_line_per_pass_and_no_graph(caplog: pytest.LogCaptureFixture, renders: list[str]) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        call(SIN, Do("nothing"))
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert_expected_inline(
        re.sub(r"\d+ ms", "N ms", text),
        """\
full 01 relu_to_sin: 2 sites, N ms, -2 aten.relu, +2 aten.sin
full 02 nothing: 0 sites, N ms""",
    )
    assert renders == []


def test_debug_logs_the_diff_of_each_pass_that_changed_the_graph(
    caplog: pytest.LogCaptureFixture, renders: list[str]
) -> None:
    with caplog.at_level(logging.DEBUG, LOGGER):
        call(Do("nothing"), SIN, COS)
    diffs = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert_expected_inline(
        "\n".join(diffs),
        """\
full 02 relu_to_sin:
  x_1: f32[2, 3] = input
- relu: f32[2, 3] = aten.relu.default(x_1)
- relu_1: f32[2, 3] = aten.relu.default(x_1)
+ relu: f32[2, 3] = aten.sin.default(x_1)
+ relu_1: f32[2, 3] = aten.sin.default(x_1)
  add: f32[2, 3] = aten.add.Tensor(relu, relu_1)
  return add
full 03 sin_to_cos:
  x_1: f32[2, 3] = input
- relu: f32[2, 3] = aten.sin.default(x_1)
- relu_1: f32[2, 3] = aten.sin.default(x_1)
+ relu: f32[2, 3] = aten.cos.default(x_1)
+ relu_1: f32[2, 3] = aten.cos.default(x_1)
  add: f32[2, 3] = aten.add.Tensor(relu, relu_1)
  return add""",
    )
    assert len(renders) == 3  # the input, and one for each change


def test_trace_keeps_numbered_graphs(artifacts: dict[str, str], renders: list[str]) -> None:
    call(SIN, Do("nothing"), COS)
    assert list(artifacts) == [
        "hero_fx_full_passes",
        "hero_fx_full_00_input",
        "hero_fx_full_01_relu_to_sin",
        "hero_fx_full_03_sin_to_cos",
    ]
    assert artifacts["hero_fx_full_passes"] == "relu_to_sin\nnothing\nsin_to_cos"
    assert list(artifacts.values())[1:] == renders
    assert_expected_inline(
        artifacts["hero_fx_full_03_sin_to_cos"],
        """\
x_1: f32[2, 3] = input
relu: f32[2, 3] = aten.cos.default(x_1)
relu_1: f32[2, 3] = aten.cos.default(x_1)
add: f32[2, 3] = aten.add.Tensor(relu, relu_1)
return add""",
    )


def test_nothing_is_rendered_when_nobody_listens(renders: list[str]) -> None:
    call(SIN, COS)
    assert renders == []
