"""Stand-ins on the CPU, of the same schemas, for attention ops that have kernels on a GPU alone or come with packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_FLASH_2 = """_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal,
SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax)
-> (Tensor, Tensor, Tensor, Tensor)"""
_PACKED_2 = """_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1,
SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False,
Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False)
-> (Tensor, Tensor, Tensor, Tensor)"""
_FLASH_3 = """_flash_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None,
Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None,
Tensor? seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None,
Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None,
Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None,
Tensor? v_descale=None, float? softmax_scale=None, bool causal=False, SymInt window_size_left=-1,
SymInt window_size_right=-1, SymInt attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True,
Tensor? scheduler_metadata=None, SymInt num_splits=1, bool? pack_gqa=None, SymInt sm_margin=0)
-> (Tensor, Tensor, Tensor, Tensor)"""

_KERNEL_3 = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None,
Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None,
Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None,
Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None,
Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None,
float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,
int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None,
int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None) -> Tensor:
    """[B, heads, N, D] each, contiguous."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).contiguous()


def attend_rows(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None) -> Tensor:
    """[B, N, heads, D] each, contiguous."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return attend(q, k, v, scale, mask).transpose(1, 2).contiguous()


def _more(out: Tensor, count: int) -> tuple[Any, ...]:
    return (out, *(out.new_empty(2) for _ in range(count)))


def _flash_2(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, *more: Any) -> Any:
    return _more(attend_rows(q, k, v, softmax_scale), 3)


def _flash_3(q: Tensor, k: Tensor, v: Tensor, *more: Any, **options: Any) -> Any:
    # The scale is the 24th argument of either schema: q, k and v are three, and `more` begins at 0.
    scale = options.get("softmax_scale", more[20] if len(more) > 20 else None)
    return _more(attend_rows(q, k, v, scale), 3)


def _diffusers_3(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, *more: Any) -> Any:
    return _more(attend_rows(q, k, v, softmax_scale), 1)


def _packed(q: Tensor, *more: Any, **options: Any) -> Any:
    return _more(q.clone(), 3)


# aten ops without a CPU kernel: name, layout, results beside the first, position of the mask, if any
_ATEN: dict[str, tuple[Any, Any]] = {
    "_scaled_dot_product_flash_attention": (attend, None),
    "_scaled_dot_product_efficient_attention": (attend, 3),
    "_scaled_dot_product_cudnn_attention": (attend, 3),
    "_scaled_dot_product_fused_attention_overrideable": (attend, 3),
    "_flash_attention_forward": (attend_rows, None),
    "_efficient_attention_forward": (attend_rows, 3),
}


def _aten(name: str) -> Any:
    function, mask = _ATEN[name]
    returns = getattr(torch.ops.aten, name).default._schema.returns

    def run(*args: Any, scale: float | None = None, **options: Any) -> Any:
        if "max_q" in (names := [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments]):
            assert args[names.index("max_q")] == args[0].shape[1], "the op must be told the true number of queries"
            assert args[names.index("max_k")] == args[1].shape[1], "the op must be told the true number of keys"
        out = function(*args[:3], scale, args[mask] if mask is not None and len(args) > mask else None)
        rest = [out.new_empty(2) if "Tensor" in str(r.type) else 0 for r in returns[1:]]
        return (out, *rest)

    return run


@contextmanager
def registered() -> Iterator[None]:
    """The stand-ins exist; they are gone behind the context."""
    import diffusers.models.attention_dispatch  # noqa: F401  (registers an op for CUDA)

    libraries = [torch.library.Library(name, "FRAGMENT") for name in ("flash_attn", "flash_attn_3")]
    two, three = libraries
    ops = (
        (two, _FLASH_2, _flash_2),
        (two, _PACKED_2, _packed),
        (three, _FLASH_3, _flash_3),
        (three, _KERNEL_3, _flash_3),
    )
    for library, schema, run in ops:
        library.define(schema.replace("\n", " "))
        name = schema.partition("(")[0]
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{name}", run, lib=library)
    dispatcher = torch.library.Library("_diffusers_flash_attn_3", "IMPL")
    dispatcher.impl("_flash_attn_forward", _diffusers_3, "CPU")
    aten = torch.library.Library("aten", "IMPL")
    for name in _ATEN:
        aten.impl(name, _aten(name), "CPU")
    try:
        yield
    finally:
        for library in (*libraries, dispatcher, aten):
            library._destroy()
