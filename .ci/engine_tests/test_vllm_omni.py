"""The vLLM-Omni plugin against vLLM-Omni itself: its plugin loader and its model runner, which has no workers on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import hero_fx
from hero_fx.engines import vllm_omni
from hero_fx.engines.settings import EngineError

STEPS = 12
CONFIG: dict[str, Any] = {
    "cache_backend": "none",
    "diffusion_compile_dynamic": False,
    "diffusion_compile_granularity": "full",
    "enforce_eager": False,
    "parallel_config": SimpleNamespace(sequence_parallel_size=1),
    "step_execution": False,
}


@pytest.fixture(scope="session")
def runner_class() -> Any:
    """The runner of the engine, after its own plugin loader has run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERO_FX", '{"policy": "taylorseer", "inner": "aot_eager"}')
        from vllm_omni.plugins import load_omni_general_plugins

        load_omni_general_plugins()
        from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner

        yield DiffusionModelRunner


def new_runner(runner_class: Any, **changed: Any) -> Any:
    runner = runner_class.__new__(runner_class)
    runner.od_config = SimpleNamespace(**CONFIG | changed)
    return runner


def test_the_loader_puts_hero_fx_into_the_runner(runner_class: Any) -> None:
    assert runner_class._compile_transformer.__module__ == vllm_omni.__name__
    before = runner_class.load_model
    vllm_omni.activate()
    assert runner_class.load_model is before  # twice is once


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"enforce_eager": True}, "leave it out"),
        ({"diffusion_compile_granularity": "regional"}, "--diffusion-compile-granularity full"),
        ({"cache_backend": "tea_cache"}, "cache_backend='tea_cache' caches too"),
        (
            {"parallel_config": SimpleNamespace(sequence_parallel_size=2)},
            "sequence_parallel_size=2, under which",
        ),
    ],
)
def test_settings_that_leave_hero_fx_out_are_refused(runner_class: Any, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        new_runner(runner_class, **changed).load_model()


def test_requests_one_after_the_other(runner_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer that the runner compiles; each execution is a session of its own, which ends with it."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32}
    model = WanTransformer3DModel(**sizes, in_channels=4, out_channels=4, text_dim=16, freq_dim=32).eval()
    model.requires_grad_(False)
    made: list[Any] = []
    new_backend = vllm_omni.new_backend
    monkeypatch.setattr(vllm_omni, "new_backend", lambda: made.append(new_backend()) or made[0])
    runner = new_runner(runner_class)
    runner.pipeline = SimpleNamespace(transformer=model)
    runner._compile_transformer("transformer")
    runner._compile_transformer("transformer_2")  # it has none

    def loop(runner: Any, reqs: list[Any]) -> Tensor:
        latents = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(reqs[0].seed))
        text = torch.ones(1, 6, 16)
        for timestep in torch.linspace(999, 100, STEPS).split(1):
            for prompt in (text, -text):
                noise = runner.pipeline.transformer(
                    hidden_states=latents, timestep=timestep, encoder_hidden_states=prompt, return_dict=False
                )[0]
            latents = latents - 0.1 * noise
        return latents

    execute = vllm_omni._execute_request_list(loop)
    requests = [SimpleNamespace(request_id=f"r{seed}", seed=seed) for seed in (0, 1, 0)]
    with torch.no_grad():
        first, _, again = (execute(runner, [request]) for request in requests)
    assert torch.equal(first, again)
    stats = made[0].stats()
    assert stats.cached_calls > 0
    assert (stats.full_calls + stats.cached_calls, stats.state_bytes) == (3 * 2 * STEPS, 0)
    hero_fx.reset()
