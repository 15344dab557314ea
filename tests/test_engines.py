"""The engine plugins without their engines; against the real packages they are tested by `.ci/engines`."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hero_fx
from hero_fx.engines import sglang, vllm_omni
from hero_fx.engines.settings import EngineError, new_backend

from .support import tiny, toys
from .support.examples import example


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HERO_FX", raising=False)
    sglang.activate()
    vllm_omni.activate()
    assert not {"sglang", "vllm_omni"} & set(sys.modules)


def test_options_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERO_FX", '{"interval": 3}')
    backend = new_backend("max-autotune-no-cudagraphs")
    assert (backend.config.interval, backend.config.mode) == (3, "max-autotune-no-cudagraphs")
    monkeypatch.setenv("HERO_FX", '{"mode": "default"}')
    assert new_backend("max-autotune-no-cudagraphs").config.mode == "default"  # what the user says wins


@pytest.mark.parametrize("value", ["", "interval=3", "[3]", '{"intervall": 3}', '{"interval": 0}'])
def test_a_value_that_is_no_option_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HERO_FX", value)
    with pytest.raises(EngineError, match=r"^HERO_FX="):
        new_backend()


def request(**changed: Any) -> Any:
    flags = {"enable_teacache": False, "enable_spectrum": False, "enable_cache_dit": None}
    named = {"request_id": "a", "extra": {}, "is_cfg_negative": False, "timesteps": torch.zeros(7)}
    return SimpleNamespace(**flags | named | changed)


def test_a_call_of_sglang_is_told_by_its_context() -> None:
    batch = request()
    sglang._configure_batch(lambda branch, batch: None, SimpleNamespace(name="unconditional"), batch)
    call = sglang._calling(batch, 3)
    assert (call.lane, call.step_index, call.num_steps) == ("unconditional", 3, 7)
    assert call.session == sglang._session(batch).id != sglang._session(request()).id
    assert sglang._calling(request(is_cfg_negative=True), 0).lane == "negative"


@pytest.mark.parametrize("name", ["enable_teacache", "enable_spectrum", "enable_cache_dit"])
def test_a_second_cache_is_refused(name: str) -> None:
    with pytest.raises(EngineError, match=name):
        sglang._calling(request(**{name: True}), 0)


def test_only_guards_on_counters_are_dropped() -> None:
    names = ["L['self'].cnt", "L['self'].spectrum_cnt", "L['self'].count", "L['hidden_states']"]
    assert sglang._guards([SimpleNamespace(name=name) for name in names]) == [False, False, True, True]


class Patcher:
    """In place of ComfyUI's: what is done with a model, by the place where it is done."""

    def __init__(self) -> None:
        self.wrappers: dict[str, Any] = {}

    def clone(self) -> Patcher:
        return Patcher()

    def add_wrapper_with_key(self, place: str, key: str, wrapper: Any) -> None:
        self.wrappers[place] = wrapper


def test_a_node_of_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trajectory that is cut short leaves nothing to the next one; prompts have features of their own."""
    made: list[hero_fx.Backend] = []
    places = SimpleNamespace(APPLY_MODEL="apply", OUTER_SAMPLE="sample")
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", SimpleNamespace(WrappersMP=places))
    helpers = SimpleNamespace(set_torch_compile_wrapper=lambda model, backend, options: made.append(backend))
    monkeypatch.setitem(sys.modules, "comfy_api.torch_helpers", helpers)
    (model,) = (
        example("comfyui_node").StepCaching().patch(Patcher(), '{"policy": "fora", "inner": "eager", "warmup": 1}')
    )
    (backend,) = made
    call, times = toys.torch_compile(toys.toy(), backend), [time.clone() for time in tiny.timesteps(9)]

    def sample(steps: range, last: int | None = None) -> list[torch.Tensor]:
        def run() -> list[torch.Tensor]:
            outputs = []
            for step in steps:
                for prompt in ("a", "b"):
                    options = {"uuids": [prompt, steps]}
                    apply = lambda x, t, *rest: call(x, t)  # noqa: E731
                    inputs = toys.latents(seed=step), times[step].expand(2)
                    outputs.append(model.wrappers["apply"](apply, *inputs, None, None, None, options))
                if step == last:
                    raise InterruptedError
            return outputs

        with torch.no_grad():
            outputs: list[torch.Tensor] = model.wrappers["sample"](run)
        assert backend.stats().sessions == 0
        return outputs

    alone = sample(range(5, 9))
    with pytest.raises(InterruptedError):
        sample(range(9), last=3)
    assert backend.stats().sessions == 0
    assert toys.same(sample(range(5, 9)), alone)
    assert backend.stats().cached_calls > 0
