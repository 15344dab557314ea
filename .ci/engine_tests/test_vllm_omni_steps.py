"""The vLLM-Omni plugin in step mode: the engine's own runner, input batches, Qwen-Image pipeline and transformer (two layers).

Left out are the text encoder and the VAE, whose two methods of the pipeline are stood in for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import hero_fx
from hero_fx.engines import vllm_omni
from hero_fx.engines.settings import EngineError
from hero_fx.runtime.batched import NotBatched

STEPS = 12
PARALLEL = SimpleNamespace(ring_degree=1, sequence_parallel_size=1, ulysses_degree=1, use_hsdp=False)
CONFIG: dict[str, Any] = {
    "cache_backend": "none",
    "diffusion_compile_dynamic": True,
    "diffusion_compile_granularity": "full",
    "enforce_eager": False,
    "parallel_config": PARALLEL,
    "step_execution": True,
    "streaming_output": False,
}


@pytest.fixture(scope="module")
def omni() -> Iterator[Any]:
    """The engine after its own plugin loader has run, and its configuration; attention by its backend for PyTorch's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERO_FX", '{"policy": "taylorseer", "inner": "aot_eager"}')
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "29618")
        from vllm.config import DeviceConfig, VllmConfig
        from vllm.distributed import parallel_state
        from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl
        from vllm_omni.platforms import current_omni_platform
        from vllm_omni.plugins import load_omni_general_plugins

        load_omni_general_plugins()
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
        patch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=1, rank_in_group=0))
        patch.setattr(SDPAImpl, "forward", SDPAImpl.forward_cuda)  # plain PyTorch, whatever its name says
        backend = f"{SDPAImpl.__module__}.SDPABackend"
        platform = type(current_omni_platform)
        patch.setattr(platform, "get_diffusion_attn_backend_cls", classmethod(lambda *_, **__: backend))
        patch.setattr(platform, "is_available", lambda _: False, raising=False)  # a device, to watch its memory
        yield VllmConfig(device_config=DeviceConfig(device="cpu"))
        torch.distributed.destroy_process_group()


def new_pipeline(vllm_config: Any) -> Any:
    """Qwen-Image without its text encoder and VAE: a prompt is its number of tokens, and decoding gives the latents."""
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.data import DiffusionOutput
    from vllm_omni.diffusion.models.qwen_image import pipeline_qwen_image, qwen_image_transformer

    class QwenImagePipeline(pipeline_qwen_image.QwenImagePipeline):
        def prepare_encode(self, state: Any, **_: Any) -> Any:
            generator = torch.Generator().manual_seed(state.sampling.seed)
            length = int(state.prompt)
            for name in ("prompt", "negative_prompt"):
                setattr(state, f"{name}_embeds", torch.randn(1, length, 16, generator=generator))
                setattr(state, f"{name}_embeds_mask", torch.ones(1, length, dtype=torch.long))
            state.latents = torch.randn(1, 16, 16, generator=generator)
            state.scheduler = FlowMatchEulerDiscreteScheduler()
            state.scheduler.set_timesteps(STEPS)
            state.timesteps, state.do_true_cfg, state.img_shapes = state.scheduler.timesteps, True, [[(1, 4, 4)]]
            state.txt_seq_lens = state.negative_txt_seq_lens = [length]
            return state

        def post_decode(self, state: Any, **_: Any) -> Any:
            return DiffusionOutput(output=state.latents.clone())

    pipeline = QwenImagePipeline.__new__(QwenImagePipeline)
    torch.nn.Module.__init__(pipeline)
    pipeline._interrupt, pipeline._attention_kwargs = False, {}
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    with set_current_vllm_config(vllm_config):
        pipeline.transformer = qwen_image_transformer.QwenImageTransformer2DModel(
            SimpleNamespace(parallel_config=PARALLEL), in_channels=16, out_channels=4, joint_attention_dim=16, **sizes
        ).eval()
    torch.manual_seed(0)
    for parameter in pipeline.transformer.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return pipeline


class Engine:
    """The runner in step mode, and what a scheduler asks of it."""

    def __init__(self, vllm_config: Any) -> None:
        from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner

        self.runner: Any = DiffusionModelRunner.__new__(DiffusionModelRunner)
        self.runner.od_config, self.runner.vllm_config = SimpleNamespace(**CONFIG), vllm_config
        self.runner.device, self.runner.state_cache, self.runner.input_batch = torch.device("cpu"), {}, None
        self.runner.kv_transfer_manager, self.runner._sample_peak_memory_mb = None, lambda: 0.0

        def load_model(runner: Any) -> None:
            runner.pipeline = new_pipeline(vllm_config)
            runner._compile_transformer("transformer")

        vllm_omni._load_model(load_model)(self.runner)
        self.results: dict[str, Tensor] = {}
        self.backend: Any = None

    def step(self, new: dict[str, int] | None = None, going_on: Sequence[str] = (), ended: Sequence[str] = ()) -> None:
        """`new`: tokens of the prompts of requests, by their names; the last character of a name is the seed."""
        from vllm_omni.diffusion.request import OmniDiffusionRequest
        from vllm_omni.diffusion.sched.interface import CachedRequestData, DiffusionSchedulerOutput, NewRequestData
        from vllm_omni.inputs.data import OmniDiffusionSamplingParams

        requests = [
            OmniDiffusionRequest(
                prompt=str(length), sampling_params=OmniDiffusionSamplingParams(seed=int(name[-1])), request_id=name
            )
            for name, length in (new or {}).items()
        ]
        out = self.runner.execute_stepwise(
            DiffusionSchedulerOutput(
                step_id=0,
                scheduled_new_reqs=[NewRequestData(request.request_id, request) for request in requests],
                scheduled_cached_reqs=CachedRequestData(list(going_on)),
                finished_req_ids=set(ended),
                num_running_reqs=0,
                num_waiting_reqs=0,
            )
        )
        for one in out.runner_outputs:
            assert one.result is None or one.result.error is None, one.result.error
            if one.finished:
                self.results[one.request_id] = one.result.output

    def run(self, starts: dict[str, int], lengths: dict[str, int]) -> None:
        """Requests that begin at steps of the engine of their own."""
        for turn in range(max(starts.values()) + STEPS):
            new = {name: lengths[name] for name, start in starts.items() if start == turn}
            self.step(new, [name for name, start in starts.items() if start < turn < start + STEPS])


@pytest.fixture(scope="module")
def engine(omni: Any) -> Iterator[Engine]:
    """It has served the requests `alone0` and `alone1`, each by itself, with prompts of 5 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        made: list[Any] = []
        new_backend = vllm_omni.new_backend
        patch.setattr(vllm_omni, "new_backend", lambda: made.append(new_backend()) or made[0])
        engine = Engine(omni)
        engine.backend = made[0]
        for name in ("alone0", "alone1"):
            engine.run({name: 0}, {name: 5})
        yield engine


def test_requests_at_different_steps_share_a_call(engine: Engine) -> None:
    before = engine.backend.stats()
    engine.run({"joint0": 0, "joint1": 3}, {"joint0": 5, "joint1": 5})
    for seed in "01":
        torch.testing.assert_close(engine.results[f"joint{seed}"], engine.results[f"alone{seed}"], rtol=0, atol=1e-5)
    after = engine.backend.stats()
    assert before.batched_graphs == 0
    assert after.batched_graphs > 0
    # As many as alone: two requests with two branches of guidance.
    calls = (after.full_calls - before.full_calls, after.cached_calls - before.cached_calls)
    assert calls == (before.full_calls, before.cached_calls)
    assert min(calls) > 0
    assert sum(calls) == 2 * 2 * STEPS
    assert (after.sessions, after.state_bytes) == (0, 0)


def test_each_is_near_the_model_alone(engine: Engine) -> None:
    pipeline = engine.runner.pipeline
    compiled, pipeline.transformer.forward = (
        pipeline.transformer.forward,
        type(pipeline.transformer).forward.__get__(pipeline.transformer),
    )
    engine.run({"plain0": 0}, {"plain0": 5})
    pipeline.transformer.forward = compiled
    error = float((engine.results["alone0"] - engine.results["plain0"]).norm() / engine.results["plain0"].norm())
    assert 0 < error < 0.1, error


def test_prompts_of_different_lengths_go_one_after_another(engine: Engine) -> None:
    """The engine pads and masks them, which is another program than each alone; one after another they are bit-equal."""
    engine.run({"long1": 0}, {"long1": 7})
    graphs = engine.backend.stats().batched_graphs
    engine.run({"mixed0": 0, "mixed1": 2}, {"mixed0": 5, "mixed1": 7})
    assert torch.equal(engine.results["mixed0"], engine.results["alone0"])
    assert torch.equal(engine.results["mixed1"], engine.results["long1"])
    assert engine.backend.stats().batched_graphs == graphs


def test_a_batch_that_is_another_program_goes_one_after_another(engine: Engine) -> None:
    """Once prompts had several lengths, Dynamo takes the length as a number of its own, which the batch does not show."""
    graphs = engine.backend.stats().batched_graphs
    engine.run({"new0": 0, "new1": 2}, {"new0": 4, "new1": 4})
    assert engine.backend.stats().batched_graphs == graphs
    for seed in "01":
        engine.run({f"again{seed}": 0}, {f"again{seed}": 4})
        assert torch.equal(engine.results[f"new{seed}"], engine.results[f"again{seed}"])


def test_an_aborted_request_is_freed(engine: Engine) -> None:
    engine.step({"aborted0": 5, "stays1": 5})
    assert set(engine.backend.stats().bytes_by_session) == {"aborted0", "stays1"}
    engine.step({}, ["stays1"], ended=["aborted0"])
    assert set(engine.backend.stats().bytes_by_session) == {"stays1"}
    for _ in range(STEPS - 2):
        engine.step({}, ["stays1"])
    torch.testing.assert_close(engine.results["stays1"], engine.results["alone1"], rtol=0, atol=1e-5)
    assert engine.backend.stats().sessions == 0


def test_a_call_that_nothing_tells_apart_is_refused(engine: Engine) -> None:
    with (
        engine.runner.hero_fx_steps.executed({}),
        pytest.raises(EngineError, match=r"outside of denoise_step.*step_execution"),
    ):
        engine.runner.pipeline.transformer(hidden_states=torch.ones(1, 16, 16))


def test_a_second_branch_of_guidance_that_is_another_program(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first branch has taken the step by then. The requests take it again from a full step, each by itself."""
    fails_at = 5
    for seed in "01":
        name = f"anew{seed}"
        for turn in range(STEPS):
            if turn == fails_at:
                hero_fx.session(name).drop()
            engine.step({name: 5} if turn == 0 else {}, [name] if turn else [])

    transformer = engine.runner.pipeline.transformer
    forward, calls = transformer.forward, 0

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * fails_at + 2:
            raise NotBatched("the second branch")
        return forward(*args, **kwargs)

    monkeypatch.setattr(transformer, "forward", fails_once)
    engine.run({"late0": 0, "late1": 0}, {"late0": 5, "late1": 5})
    assert calls == 2 * fails_at + 2 + 2 * 2 * (
        STEPS - fails_at
    )  # together, then the two that failed, then one after another
    for seed in "01":
        late, anew, alone = (engine.results[f"{name}{seed}"] for name in ("late", "anew", "alone"))
        torch.testing.assert_close(late, anew, rtol=0, atol=1e-5)
        assert float((anew - alone).abs().max()) > 1e-3  # the step would have been a cached one
    assert engine.backend.stats().sessions == 0
