"""SGLang's diffusion runtime on a CPU, where some of its parts have no kernels: what stands in for them, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

# Wheels of torchvision for a GPU cannot load their library beside a CPU build of torch; importing it needs the names alone.
_VISION = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    _VISION.define(f"{_name}(Tensor x) -> Tensor")
for _name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    _VISION.define(f"_{_name}_backward(Tensor x) -> Tensor")

ARGUMENTS: dict[str, Any] = {
    "attention_backend": "torch_sdpa",
    "cache_dit_config": None,
    "enable_attention_backend_autotune": False,
    "enable_breakable_cuda_graph": False,
    "enable_torch_compile": True,
    "kv_gather_degree": 1,
    "regional_compile": False,
    "ring_degree": 1,
    "sp_degree": 1,
    "tp_size": 1,
    "ulysses_degree": 1,
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """RoPE on pairs of neighbouring channels; [tokens, heads, width] with angles [tokens, width / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


@pytest.fixture(scope="session")
def server_args() -> Any:
    return SimpleNamespace(
        **ARGUMENTS, pipeline_config=SimpleNamespace(dit_config=SimpleNamespace(torch_compile_mode="default"))
    )


@pytest.fixture(scope="session")
def hooks() -> Any:
    """SGLang's own plugin loader, with hero_fx switched on; the hooks it applied."""
    os.environ["HERO_FX"] = '{"interval": 2, "policy": "taylorseer", "inner": "aot_eager"}'
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, apply_plugin_hooks

    apply_plugin_hooks()
    return HookRegistry


@pytest.fixture(scope="session")
def wan(hooks: Any, server_args: Any) -> Iterator[Any]:
    """SGLang's own Wan, two layers of it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29617", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    from sglang.multimodal_gen.configs.models.dits.wanvideo import WanVideoArchConfig, WanVideoConfig
    from sglang.multimodal_gen.runtime.distributed import parallel_state
    from sglang.multimodal_gen.runtime.layers import custom_op, layernorm
    from sglang.multimodal_gen.runtime.layers.rotary_embedding import utils
    from sglang.multimodal_gen.runtime.models.dits.wanvideo import WanTransformer3DModel
    from sglang.multimodal_gen.runtime.platforms import current_platform
    from sglang.multimodal_gen.runtime.server_args import server_args as settings

    custom_op.CustomOp.dispatch_forward = lambda self: self.forward_native
    layernorm.fuse_scale_shift_kernel = lambda x, scale, shift, one=1.0: x * (one + scale) + shift
    layernorm.FP32LayerNorm._cached_fp32_param = lambda self, name, value, device: (
        None if value is None else value.float()
    )
    utils.apply_rotary_embedding = rotate
    type(current_platform).is_amp_supported = classmethod(lambda cls: True)
    settings.set_global_server_args(server_args)
    parallel_state.maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "ffn_dim": 64}
    inputs = {"text_dim": 16, "freq_dim": 32, "in_channels": 4, "out_channels": 4}
    model = WanTransformer3DModel(WanVideoConfig(arch_config=WanVideoArchConfig(**sizes, **inputs)), {}).eval()
    torch.manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    yield model
    torch.distributed.destroy_process_group()
