"""Step graphs through Inductor: what its options are, what comes out, and what is done where it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError
from torch._inductor.output_code import CompiledFxGraph

from .support import tiny, toys
from .support.toys import run_toy, toy_backend

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

aten = torch.ops.aten
IN_PLACE = (aten.copy_.default, aten.index_copy_.default)


@pytest.mark.parametrize("policy", ["hero", "full"])
def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    asked: list[tuple[Any, Any]] = []

    class Wrapper:
        def __init__(self, mode: Any, options: Any, dynamic: Any) -> None:
            asked.append((mode, dict(options)))

        def __call__(self, gm: Any, inputs: Any) -> Any:
            return gm.forward

    grid = toys.GRID if policy == "hero" else None
    wanted = 2 if policy == "hero" else 1
    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Wrapper)
    run_toy(toy_backend(policy=policy, grid=grid, inner="inductor", mode="max-autotune", options={"a": 1}))
    assert asked == [("max-autotune", {"a": 1})] * wanted
    asked.clear()
    torch._dynamo.reset()
    backend = toy_backend(policy=policy, grid=grid, inner="inductor", options={"a": 1, "b": 1})
    run_toy(backend, options={"b": 2, "c": 3})
    assert asked == [(None, {"a": 1, "b": 2, "c": 3})] * wanted
    asked.clear()
    torch._dynamo.reset()
    run_toy(toy_backend(policy=policy, grid=grid, inner="inductor", mode="default"), mode="reduce-overhead")
    assert asked == [("reduce-overhead", {})] * wanted


@pytest.mark.exhaustive
@pytest.mark.parametrize("policy", ["lean", "toca"])
def test_inductor_gives_what_the_graphs_give(policy: str) -> None:
    """HERO is below, TaylorSeer in test_legality.py, a forecast in test_forecast.py."""
    ours, theirs = (run_toy(toy_backend(policy, inner=inner)) for inner in ("inductor", "eager"))
    assert tiny.worst(ours, theirs) < 1e-4


def test_hero_through_inductor_which_may_record_both_steps_as_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor gives CUDA graphs up where a graph writes to an input whose address may change."""
    compiled: list[tuple[set[int], set[int]]] = []
    original = CompiledFxGraph.post_compile

    def watched(self: Any, *args: Any) -> Any:
        compiled.append((set(self.mutated_input_idxs), set(self.fx_kwargs["static_input_idxs"])))
        return original(self, *args)

    monkeypatch.setattr(CompiledFxGraph, "post_compile", watched)
    backend = toy_backend(mode="reduce-overhead", inner="inductor")
    ours = run_toy(backend, model := toys.toy())
    weights = len(list(model.parameters()))
    assert len(compiled) == 2
    for gm, (written, fixed) in zip((backend.graphs[0].full, *backend.graphs[0].cached), compiled, strict=True):
        assert len(written) == len([n for n in gm.graph.nodes if n.target in IN_PLACE]) > 0
        assert written <= fixed
        assert len(fixed) >= weights + len(written)
    torch._dynamo.reset()
    assert tiny.worst(ours, run_toy(toy_backend())) < 1e-4


@pytest.mark.parametrize("missing", ["buf144", "x"])
def test_where_inductor_fails_to_fuse_loops_it_compiles_without_fusion(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What torch 2.13 raises on the CPU where all tokens of two layers are refreshed; other errors stay errors."""
    theirs = run_toy(toy_backend())
    torch._dynamo.reset()

    class Wrapper:
        def __init__(self, mode: Any, options: Any, dynamic: Any) -> None:
            self.fuses = options.get("max_fusion_size") != 1

        def __call__(self, gm: Any, inputs: Any) -> Any:
            if self.fuses:
                raise InductorError(KeyError(missing), None)
            return gm.forward

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Wrapper)
    with caplog.at_level("WARNING", "hero_fx"):
        if missing == "x":
            with pytest.raises(BackendCompilerFailed, match="KeyError: 'x'"):
                run_toy(toy_backend(inner="inductor"))
        else:
            assert toys.same(run_toy(toy_backend(inner="inductor")), theirs)
    assert caplog.text.count("compiled without fusion") == (2 if missing == "buf144" else 0)
