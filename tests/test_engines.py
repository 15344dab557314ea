"""The engine plugins without their engines; against the real packages they are tested by `.ci/engines`."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hero_fx.engines import sglang, vllm_omni
from hero_fx.engines.settings import EngineError, new_backend


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
