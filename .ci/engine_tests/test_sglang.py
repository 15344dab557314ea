"""The SGLang plugin against SGLang itself: its plugin loader, hooks, compile call, forward context and Wan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

STEPS = 12


def new_stage(server_args: Any, **changed: Any) -> Any:
    from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
    from sglang.multimodal_gen.runtime.utils.torch_compile import CompiledModuleRegistry

    stage = DenoisingStage.__new__(DenoisingStage)
    stage.server_args = SimpleNamespace(**vars(server_args) | changed)
    stage._cache_dit_enabled, stage._torch_compile_registry = False, CompiledModuleRegistry()
    stage._extra_func_kwarg_names_cache, stage._bcg_runners = {}, {}
    stage._maybe_get_bcg_runner = lambda model: None
    return stage


def new_request(name: str) -> Any:
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

    parameters = SamplingParams(request_id=name, prompt="", num_inference_steps=STEPS)
    request = Req(
        sampling_params=parameters, timesteps=torch.linspace(999, 100, STEPS), do_classifier_free_guidance=True
    )
    # All it has, without its __getattr__, which Dynamo of torch 2.13 cannot trace; SGLang pins a newer torch.
    return SimpleNamespace(**vars(parameters) | vars(request))


class Loop:
    """The denoising loop of one request, as the stage runs it, a step at a time."""

    def __init__(self, stage: Any, model: Any, seed: int) -> None:
        from sglang.multimodal_gen.runtime.distributed.cfg_policy import CFGPolicy

        generator = torch.Generator().manual_seed(seed)
        self.stage, self.model, self.request = stage, model, new_request(f"request-{seed}")
        self.latents = torch.randn(1, 4, 2, 8, 8, generator=generator)
        text, none = (torch.randn(1, 6, 16, generator=generator) for _ in range(2))
        self.policy = CFGPolicy().build(
            self.request, {}, {"encoder_hidden_states": text}, {"encoder_hidden_states": none}
        )

    @torch.no_grad()
    def step(self, index: int) -> None:
        from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

        noises = []
        for branch in self.policy.branches:
            branch.configure_batch(self.request)
            with set_forward_context(current_timestep=index, attn_metadata=None, forward_batch=self.request):
                noises.append(
                    self.stage._predict_noise(
                        current_model=self.model,
                        latent_model_input=self.latents,
                        timestep=self.request.timesteps[index : index + 1],
                        target_dtype=torch.float32,
                        guidance=None,
                        **branch.kwargs,
                    )
                )
        self.latents = self.latents - 0.1 * (noises[1] + 3 * (noises[0] - noises[1]))

    def run(self) -> Tensor:
        for index in range(STEPS):
            self.step(index)
        return self.latents


def test_the_loader_applies_every_hook(hooks: Any) -> None:
    assert len(hooks._hooks) == 5
    assert set(hooks._hooks) == hooks._patched


def test_requests_do_not_mix(wan: Any, server_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests in turns, two branches each: every result is that of the request alone; most calls are cached."""
    from hero_fx.engines import sglang

    made: list[Any] = []
    new_backend = sglang.new_backend
    monkeypatch.setattr(sglang, "new_backend", lambda mode: made.append(new_backend(mode)) or made[0])
    stage = new_stage(server_args)
    stage._maybe_torch_compile(wan)
    assert stage._torch_compile_registry.is_compiled(wan)
    alone = [Loop(stage, wan, seed).run() for seed in range(2)]
    loops = [Loop(stage, wan, seed) for seed in range(2)]
    for index in range(STEPS):
        for loop in loops:
            loop.step(index)
    assert all(torch.equal(loop.latents, one) for loop, one in zip(loops, alone, strict=True))
    stats = made[0].stats()
    # Of 12 steps 4 are cached: warm-up and end are full. Four trajectories, two branches.
    assert (stats.full_calls, stats.cached_calls) == (64, 32), stats
    plain = Loop(stage, wan.forward, 0).run()
    error = float((alone[0] - plain).norm() / plain.norm())
    assert 0 < error < 0.1, error


def test_the_vae_is_left_to_the_engine(hooks: Any, server_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoding stage compiles it by a call that hero_fx has no hook on."""
    from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
    from sglang.multimodal_gen.runtime.utils.torch_compile import ActiveTargetCompiledCallable

    from hero_fx.engines import sglang

    monkeypatch.setattr(sglang, "new_backend", lambda mode: pytest.fail("hero_fx is asked to compile a VAE"))
    vae, stage = torch.nn.Linear(1, 1), DecodingStage.__new__(DecodingStage)
    stage._compiled_vae_decode = ActiveTargetCompiledCallable()
    stage._get_vae_decode_fn(vae, server_args, decode_fn=vae.forward)
    assert stage._compiled_vae_decode.target_id == id(vae)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"enable_torch_compile": False}, "--enable-torch-compile is not given"),
        ({"regional_compile": True}, "needs the whole transformer"),
        ({"enable_breakable_cuda_graph": True}, "--enable-breakable-cuda-graph false"),
        ({"ulysses_degree": 2}, "degree 2.*--num-gpus 1"),
    ],
)
def test_settings_that_leave_hero_fx_out_are_refused(
    hooks: Any, server_args: Any, changed: dict[str, Any], words: str
) -> None:
    from hero_fx.engines.settings import EngineError

    with pytest.raises(EngineError, match=words):
        new_stage(server_args, **changed)._maybe_torch_compile(torch.nn.Linear(1, 1))


def test_a_version_without_a_target_is_refused(hooks: Any, server_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hero_fx.engines.settings import EngineError

    monkeypatch.setattr(hooks, "_patched", {name for name in hooks._patched if not name.endswith("compile_once")})
    with pytest.raises(EngineError, match=r"no .*compile_once"):
        new_stage(server_args)._maybe_torch_compile(torch.nn.Linear(1, 1))


def test_a_second_cache_is_refused(wan: Any, server_args: Any) -> None:
    from hero_fx.engines.settings import EngineError

    loop = Loop(new_stage(server_args), wan, 0)
    loop.request.enable_teacache = True
    with pytest.raises(EngineError, match="enable_teacache"):
        loop.step(0)


@pytest.mark.parametrize("value", ["interval=3", "[3]", '{"intervall": 3}', '{"interval": 0}'])
def test_a_setting_that_is_no_option_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    from hero_fx.engines.settings import EngineError, new_backend

    monkeypatch.setenv("HERO_FX", value)
    with pytest.raises(EngineError, match="HERO_FX="):
        new_backend()
