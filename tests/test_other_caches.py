"""A model on which another cache works is refused, and the message says which it is and how to take it off."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.layerwise_casting import apply_layerwise_casting

import hero_fx
from hero_fx.other_caches import cache_in_the_way

from .support import tiny, toys

CACHES: dict[str, Callable[[], Any]] = {
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda: diffusers.MagCacheConfig(mag_ratios=torch.ones(9), num_inference_steps=9),
    "TaylorSeerCache": lambda: diffusers.TaylorSeerCacheConfig(),
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_diffusers(name: str) -> None:
    torch._dynamo.reset()
    model, call = tiny.cogvideox(layers=2), tiny.inputs()
    model.enable_cache(CACHES[name]())
    compiled = toys.torch_compile(model, hero_fx.backend(inner=tiny.INNER))
    with (
        torch.no_grad(),
        model.cache_context("cond"),
        pytest.raises(Exception, match=rf"diffusers' {name} .*model\.disable_cache\(\)"),
    ):
        compiled(**call, timestep=toys.times(1)[0], return_dict=False)
    model.disable_cache()
    assert cache_in_the_way(model) is None


def test_a_hook_put_there_by_hand_is_named_and_comes_off_as_the_message_says() -> None:
    model = tiny.cogvideox(layers=2)
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
    message = cache_in_the_way(model)
    assert message is not None
    assert "FBCHeadBlock changes what transformer_blocks.0 computes" in message
    while (message := cache_in_the_way(model)) is not None:  # it has two kinds of hooks
        eval(message[message.index("diffusers.hooks.HookRegistry") :], {"diffusers": diffusers, "model": model})


def test_hooks_that_change_nothing_may_stay() -> None:
    model = tiny.cogvideox(layers=2)
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    assert cache_in_the_way(model) is None
    assert cache_in_the_way(None) is None


def test_cache_dit() -> None:
    model: Any = toys.toy()
    forward = FunctionType(toys.ToyDiT.forward.__code__, {"__name__": "cache_dit.caching"}, "forward")
    model.forward = MethodType(forward, model)
    assert "cache_dit.disable_cache" in str(cache_in_the_way(model))
