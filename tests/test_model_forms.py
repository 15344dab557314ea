"""What is done to a model before or after it is compiled: adapters, quantised weights, dtypes, memory formats, offload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import hero_fx

from .support import tiny, toys
from .support.examples import example

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
zoo = example("_zoo")

SETTINGS: dict[str, Any] = {"inner": tiny.INNER, "interval": 3, "warmup": 1}
AOT: dict[str, Any] = {"inner": "aot_eager"}
"""Where weights are subclasses of tensors, or memory has another order."""
TOY: dict[str, Any] = {"grid": toys.GRID}
# Every layer recomputes every token, so that cached steps must give what full ones do.
ALL: dict[str, Any] = {**SETTINGS, "refresh_layers": 1.0, "refresh_ratio": 1.0, "text": "live"}
STEPS = 5


def hero(model: Any, settings: dict[str, Any] = SETTINGS, **options: Any) -> tuple[Any, hero_fx.Backend]:
    torch._dynamo.reset()
    backend = hero_fx.backend(**settings)
    return toys.torch_compile(model, backend=backend, **{"fullgraph": True, **options}), backend


def outputs(call: Any) -> list[Tensor]:
    return tiny.denoise(call, tiny.inputs(), tiny.timesteps(STEPS))


def toy_outputs(call: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return toys.loop(call, toys.latents().to(dtype), toys.times(STEPS))


def lora(model: Any, rank: int = 3) -> dict[str, Tensor]:
    """Weights of adapters for the attention of every layer."""
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for name, module in model.named_modules():
        if name.endswith(("to_q", "to_v", "to_out.0")):
            weights[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            weights[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) / 4
    return weights


def test_lora_loaded_and_fused() -> None:
    model = tiny.cogvideox(layers=2)
    call, backend = hero(model)
    before = outputs(call)
    call.load_lora_adapter(lora(model), prefix=None)
    loaded = outputs(call)
    assert tiny.worst(loaded, before) > 1e-2
    assert backend.stats().graphs == 2
    model.fuse_lora()
    assert tiny.worst(outputs(hero(model)[0]), loaded) < 1e-4
    model.unload_lora()
    assert tiny.worst(outputs(hero(model)[0]), loaded) < 1e-4
    assert backend.stats().cached_steps == 2 * 3


def test_quantised_weights() -> None:
    """The same as the model with the weights that the quantised values stand for; one block is of int8, one of float8."""
    model, rounded = toys.toy(), toys.toy()
    quantize_(model.blocks[0], Int8WeightOnlyConfig(version=2))
    quantize_(model.blocks[1], Float8WeightOnlyConfig(version=2))
    for module, other in zip(model.blocks.modules(), rounded.blocks.modules(), strict=True):
        if isinstance(module, nn.Linear):
            assert not torch.equal(other.weight, module.weight.dequantize())
            other.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    call, backend = hero(model, SETTINGS | AOT | TOY)
    theirs, reference = hero(rounded, SETTINGS | TOY)
    assert tiny.worst(toy_outputs(call), toy_outputs(theirs)) < 1e-4
    ours, plain = backend.graphs[0], reference.graphs[0]
    assert [b.kind for b in ours.structure.branches] == [b.kind for b in plain.structure.branches]
    assert ours.state_bytes == plain.state_bytes
    assert hero_fx.flops(ours.cached[0]) == hero_fx.flops(plain.cached[0])


def test_quantised_activations() -> None:
    model = toys.toy()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(version=2))
    call, _ = hero(model, SETTINGS | TOY)
    fix = "Its weights are Int8Tensor: layers with quantised weights are followed, those that quantise activations too are not"
    with pytest.raises(hero_fx.UnsupportedModel, match=fix):
        hero_fx.trace(call, toys.latents(), toys.times(1)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype: torch.dtype) -> None:
    model = toys.toy().to(dtype)
    call, backend = hero(model, ALL | TOY)
    ours, plain = toy_outputs(call, dtype), toy_outputs(model, dtype)
    assert [out.dtype for out in ours] == [dtype] * STEPS
    assert tiny.worst(ours, plain) < 2e-2
    assert {spec.dtype for spec in backend.graphs[0].state} == {dtype}


def test_channels_last() -> None:
    sample = zoo.sample("sd3")
    last = torch.channels_last
    model = sample.model.to(memory_format=last)
    call, backend = hero(model, ALL | AOT)
    with torch.no_grad():
        for step in range(STEPS):
            inputs = sample.at(step / STEPS)
            inputs[sample.latents] = inputs[sample.latents].to(memory_format=last)
            ours, plain = (run(**inputs, return_dict=False)[0] for run in (call, model))
            torch.testing.assert_close(ours, plain)
            assert ours.stride() == plain.stride()
    assert backend.stats().cached_steps == 3


def test_a_transformer_that_is_moved_as_a_whole() -> None:
    """What `pipe.enable_model_cpu_offload` does to each part; that itself asks for an accelerator."""
    call, backend = hero(toys.toy(), SETTINGS | TOY)
    expected = toy_outputs(call)
    call, _ = accelerate.cpu_offload_with_hook(call, execution_device="cpu")
    assert toys.same(toy_outputs(call), expected)
    assert backend.stats().graphs == 1


def sequential(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def whole(model: Any) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


def by_group(kind: str) -> Callable[[Any], None]:
    here = torch.device("cpu")
    blocks = 1 if kind == "block_level" else None

    def offload(model: Any) -> None:
        model.enable_group_offload(here, here, offload_type=kind, num_blocks_per_group=blocks)

    return offload


OFFLOAD = {
    "sequential": sequential, "whole, before compiling": whole,
    "leaves": by_group("leaf_level"), "blocks": by_group("block_level"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OFFLOAD)
def test_offload_hooks_that_break_the_graph(kind: str) -> None:
    model = tiny.cogvideox(layers=2)
    OFFLOAD[kind](model)
    call, _ = hero(model, fullgraph=False)
    fix = r"(?s)graph break.*Offload hooks.* in place of .* call pipe.enable_model_cpu_offload\(\), and only after"
    with pytest.raises(BackendCompilerFailed, match=fix):
        outputs(call)
