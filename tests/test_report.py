"""`hero_fx.explain` and `hero_fx.trace`; what TORCH_LOGS and TORCH_TRACE show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import hero_fx
from hero_fx.passes.rewrite.plan import Fallback

from .support import tiny, toys

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny_steps() -> hero_fx.StepGraphs:
    """The tiny CogVideoX, traced once: the explanations of many options come from its rewrites."""
    call = {**tiny.inputs(), "timestep": tiny.timesteps(1).expand(2), "return_dict": False}
    return hero_fx.explain(tiny.cogvideox(), **call, backend=hero_fx.backend("fora")).steps


def explained(traced: hero_fx.StepGraphs, **options: Any) -> str:
    """What `explain` says of a traced model under other options."""
    backend = hero_fx.backend(**options)
    return hero_fx.Explanation(backend.rewrite(traced), backend.config).findings


def explain_toy(model: Any = None, **options: Any) -> hero_fx.Explanation:
    """What `explain` says of a toy, with the model's own backend if there are no options."""
    backend = hero_fx.backend(**options) if options else None
    model = toys.toy(layers=2) if model is None else model
    return hero_fx.explain(model, toys.latents(), toys.times(1)[0], backend=backend)


@pytest.fixture(scope="module")
def toy_steps() -> hero_fx.StepGraphs:
    """A toy, traced once: the explanations of many options come from its rewrites."""
    return explain_toy(policy="fora").steps


def test_explain_hero(tiny_steps: hero_fx.StepGraphs) -> None:
    assert_expected_inline(
        explained(tiny_steps, num_steps=50, form="literal"),
        """\
4 layers, 8 branches: 4 attention, 4 ffn
residual streams: image [72 image tokens x 32], text [7 text tokens x 32]
token grid (frames, height, width): (3, 4, 6)
outside of any branch, computed at every step: 2.0% of a full step's FLOPs
a cached step refreshes 12 of 72 image tokens, sampled in patches of (1, 2, 3); no token waits longer than 10 cached steps in a row

layers    branch     updates     first module                 cached step
--------  ---------  ----------  ---------------------------  ----------------------------------------------------------------------
0-1       attention  image+text  transformer_blocks.0.attn1   refresh 12 tokens, keys all, text skip, others extrapolate (post_gate)
0-1       ffn        image+text  transformer_blocks.0.ff.net  refresh 12 tokens, keys all, text skip, others extrapolate (post_gate)
2         attention  image+text  transformer_blocks.2.attn1   extrapolate, order 1 (post_gate)
2         ffn        image+text  transformer_blocks.2.ff.net  extrapolate, order 1 (post_gate)
3         attention  image+text  transformer_blocks.3.attn1   extrapolate, order 1 (post_gate)
3         ffn        image       transformer_blocks.3.ff.net  extrapolate, order 1 (post_gate)

GFLOPs               GEMM + conv    with attention    of full compute
-----------------  -------------  ----------------  -----------------
full step                  0.016             0.022              1.000
cached step                0.002             0.002              0.092
50 steps, 27 full          0.468             0.651              0.582

state                                 tensors     MB
----------------------------------  ---------  -----
features Y_0                               15  0.160
features Y_1                               15  0.160
keys and values                             4  0.081
feature state per lane and session         34  0.401""",
    )


def test_explain_duca(tiny_steps: hero_fx.StepGraphs) -> None:
    assert_expected_inline(
        explained(tiny_steps, policy="duca", form="literal"),
        """\
4 layers, 8 branches: 4 attention, 4 ffn
residual streams: image [72 image tokens x 32], text [7 text tokens x 32]
token grid (frames, height, width): (3, 4, 6)
outside of any branch, computed at every step: 2.0% of a full step's FLOPs

layers    branch     updates     first module                 cached step, kind 0                                   cached step, kind 1
--------  ---------  ----------  ---------------------------  ----------------------------------------------------  ---------------------
0-2       attention  image+text  transformer_blocks.0.attn1   reuse (pre_gate)                                      reuse (pre_gate)
0-2       ffn        image+text  transformer_blocks.0.ff.net  refresh the best 17% by values, text skip (pre_gate)  reuse (pre_gate)
3         attention  image+text  transformer_blocks.3.attn1   reuse (pre_gate)                                      reuse (pre_gate)
3         ffn        image       transformer_blocks.3.ff.net  refresh the best 17% by values, text skip (pre_gate)  reuse (pre_gate)

GFLOPs                 GEMM + conv    with attention    of full compute
-------------------  -------------  ----------------  -----------------
full step                    0.016             0.022              1.000
cached step, kind 0          0.002             0.002              0.090
cached step, kind 1          0.000             0.000              0.020

state                                 tensors     MB
----------------------------------  ---------  -----
features Y_0                               15  0.160
token scores and ages                       8  0.005
feature state per lane and session         23  0.165

note: num_steps is not given, so the end of a trajectory is not known and cooldown=1 forces no full step""",
    )


@pytest.mark.parametrize(
    ("shown", "options"),
    [
        ("reuse (post_gate)", {"policy": "fora", "cache_point": "post_gate"}),
        ("extrapolate, order 2 (pre_gate)", {"policy": "taylorseer", "order": 2}),
        pytest.param(
            "refresh the best 50% by attention, text skip (pre_gate)",
            {"policy": "toca", "refresh_ratio": 0.5},
        ),
        ("keys sampled, text skip, others extrapolate (post_gate)", {"keys": "sampled"}),
        ("keys all, text live, others reuse (pre_gate)", {"text": "live", "unsampled": "reuse"}),
        ("token grid (frames, height, width): (2, 3, 5)", {}),
        (
            "refreshes 12 of 30 image tokens, sampled in patches of (1, 1, 5)",
            {"patch": (1, 1, 5), "refresh_ratio": 0.4},
        ),
        ("token grid (frames, height, width): not read from the graph", {"policy": "fora"}),
        ("9 steps, 5 full", {"policy": "fora", "num_steps": 9, "interval": 4}),
    ],
    ids=str,
)
def test_explain_options(shown: str, options: dict[str, Any], toy_steps: hero_fx.StepGraphs) -> None:
    grid = None if options.get("policy") in ("fora", "taylorseer") else toys.GRID
    text = explained(toy_steps, **options, grid=grid)
    assert shown in text
    assert text.startswith("2 layers, 4 branches: 2 attention, 2 ffn\nresidual streams: image [30 image tokens x 16]\n")


def test_explain_a_backend_after_a_call_only() -> None:
    backend = hero_fx.backend(inner="eager", grid=toys.GRID)
    with pytest.raises(ValueError, match="compiled nothing yet: call the compiled model once, or explain the model"):
        hero_fx.explain(backend)
    toys.loop(torch.compile(toys.toy(layers=2), backend=backend), toys.latents(), toys.times(1))
    explanation = hero_fx.explain(backend)
    assert explanation.steps is backend.graphs[-1]
    assert explanation.findings == explain_toy(inner="eager", grid=toys.GRID).findings


def test_explain_names_branches_that_fall_back(toy_steps: hero_fx.StepGraphs) -> None:
    steps = replace(toy_steps, fallbacks=(Fallback("layer 1 attention", "aten.fft has no rule"),))
    assert hero_fx.Explanation(steps, hero_fx.backend("fora").config).findings.endswith(
        "note: layer 1 attention is computed in full at every step: aten.fft has no rule\n"
        "note: num_steps is not given, so the end of a trajectory is not known and cooldown=1 forces no full step"
    )


def test_explain_ends_with_what_each_pass_did(toy_steps: hero_fx.StepGraphs) -> None:
    explanation = hero_fx.Explanation(toy_steps, hero_fx.backend("fora").config)
    lines = str(explanation).splitlines()[-len(explanation.passes.splitlines()) :]
    assert lines[0].split() == ["graph", "pass", "sites", "nodes", "ms"]
    rows = {tuple(line.split()[:2]): line.split()[2:4] for line in lines[2:-1]}
    normal = [r for r in toy_steps.records if r.pipeline == "normal"]
    wanted = {("normal", r.name): [str(r.sites), f"{r.nodes_after - r.nodes_before:+d}"] for r in normal if r.sites}
    assert wanted
    assert {key: row for key, row in rows.items() if key[0] == "normal"} == wanted
    assert rows["cached", "reuse"] == ["4", "+4"]
    assert {"refresh", "quantize_state"} & set(lines[-1].removeprefix("nothing to do: ").split(", ")) == {"refresh"}


def test_trace_uses_the_backend_that_the_model_was_compiled_with() -> None:
    ours = hero_fx.backend("fora", inner="eager")
    call = torch.compile(toys.toy(layers=2), backend=ours, fullgraph=True)
    explanation = explain_toy(call)
    assert explanation.config is ours.config
    assert not ours.graphs, "it was traced, not compiled"
    assert explain_toy(call, policy="taylorseer").config.policy == "taylorseer"
    plain: Any = torch.compile(toys.toy(layers=2), backend="eager")
    assert hero_fx.trace(plain, toys.latents(), toys.times(1)[0], backend=ours).plans
    assert "patches are runs of tokens in a row" in str(explain_toy(plain))  # that is the default backend speaking


def test_trace_on_the_meta_device() -> None:
    backend = hero_fx.backend("fora")
    model, inputs = tiny.cogvideox(layers=2), {**tiny.inputs(), "timestep": tiny.timesteps(1).expand(2)}
    real = hero_fx.trace(model, **inputs, return_dict=False, backend=backend)
    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)
    meta = hero_fx.trace(model.to("meta"), **inputs, return_dict=False, backend=backend)
    assert {spec.device.type for spec in meta.state} == {"meta"}
    assert [(spec.slot, spec.shape) for spec in meta.state] == [(spec.slot, spec.shape) for spec in real.state]
    assert [hero_fx.flops(gm) for gm in (meta.full, *meta.cached)] == [
        hero_fx.flops(gm) for gm in (real.full, *real.cached)
    ]


def test_trace_raises_what_compiling_would() -> None:
    with pytest.raises(hero_fx.UnsupportedModel, match=r"call model\.eval\(\) first"):
        explain_toy(toys.toy(layers=2).train(), policy="fora")
    with pytest.raises(hero_fx.UnsupportedModel, match="single transformer block"):
        explain_toy(toys.toy(layers=1), policy="fora")
    with pytest.raises(ValueError, match="policy='full' rewrites nothing"):
        explain_toy(policy="full")
    with pytest.raises(TypeError, match="latents"):
        hero_fx.trace(toys.toy(layers=2), backend=hero_fx.backend("fora"))


def test_trace_leaves_no_compiled_code_behind() -> None:
    """Dynamo compiles a function eight times at most (here: two): looking at a model must not use that up."""
    model = toys.toy(layers=2)
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(2):
            explain_toy(model, policy="fora")
        call = torch.compile(model, backend=hero_fx.backend("fora", inner="eager"), fullgraph=True)
        assert len(toys.loop(call, toys.latents(), toys.times(5))) == 5


SCRIPT = """
import torch, hero_fx
from tests.support import toys

call = torch.compile(toys.toy(layers=2), backend=hero_fx.backend(inner="eager", grid=toys.GRID), fullgraph=True)
toys.loop(call, toys.latents(), toys.times(1))
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What a process with TORCH_LOGS and TORCH_TRACE writes: (stderr, trace)."""
    folder = tmp_path_factory.mktemp("trace")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "TORCH_LOGS": "+hero_fx", "TORCH_TRACE": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stderr, "".join(path.read_text() for path in sorted(folder.iterdir()))


def test_torch_logs_show_passes_and_graph_diffs(logged: tuple[str, str]) -> None:
    lines = [line.split("] ", 2)[-1] for line in logged[0].splitlines() if "passes/pipeline.py" in line]
    passes = [line.split(":")[0] for line in lines if " sites, " in line]
    assert {"normal 01 resolve_autocast", "full 01 record_features", "cached 01 refresh"} <= set(passes)
    diff = lines[lines.index("cached 01 refresh:") + 1 :]
    assert any(line.startswith("- ") for line in diff)
    assert any(line.startswith("+ ") and "aten.index_copy.default(" in line for line in diff)


def test_torch_trace_holds_the_graphs(logged: tuple[str, str]) -> None:
    for name in ("hero_fx_full_00_input", "hero_fx_full_01_record_features", "hero_fx_cached_01_refresh"):
        assert f'"name": "{name}"' in logged[1]
    assert "= aten.index_copy.default(" in logged[1]


def test_scales_and_gates_are_not_filed_under_keys_and_values(toy_steps: hero_fx.StepGraphs) -> None:
    backend = hero_fx.backend(unsampled="gate", state_dtype=torch.int8, grid=toys.GRID)
    explanation = hero_fx.Explanation(backend.rewrite(toy_steps), backend.config)
    cells = [re.split(r" {2,}", line) for line in str(explanation).splitlines()]
    rows = {row[0]: row[1] for row in cells if len(row) == 3}
    state = explanation.steps.state
    assert int(rows["scales of int8 state"]) == sum(spec.dtype is torch.int8 for spec in state) > 0
    assert int(rows["gates"]) > 0
    assert int(rows["keys and values"]) == 2
