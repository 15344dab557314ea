"""`hero_fx.passes.attention`: every op of the table, in the same model, gives what SDPA gives; unknown ops are named."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hero_fx.passes.analysis.follow import follow
from hero_fx.passes.analysis.tokens import NoRule, Segment, Tokens
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.rewrite.plan import Refresh, ScoredRefresh

from .support import toys
from .support.attention_ops import registered
from .support.axis import IMAGE_TOKENS, TEXT_TOKENS, TOKENS, stream
from .support.layers import D, Model, Part, norm
from .support.steps_by_hand import Toy
from .support.tracing import Variants, trace
from .test_architectures import repeats, trajectory

aten = torch.ops.aten
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True, scope="module")
def ops() -> Iterator[None]:
    with registered():
        yield


def rows(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """Of an op on [B, N, heads, D]."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return op(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    return run


# by name, with a mask where the op takes one
OPS: dict[str, Attend] = {
    "aten::scaled_dot_product_attention": lambda q, k, v, m: aten.scaled_dot_product_attention(q, k, v, m, scale=0.3),
    "aten::_scaled_dot_product_attention_math": lambda q, k, v, m: aten._scaled_dot_product_attention_math(
        q, k, v, m, scale=0.3
    )[0],
    "aten::_scaled_dot_product_flash_attention": lambda q, k, v, m: aten._scaled_dot_product_flash_attention(
        q, k, v, scale=0.3
    )[0],
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, m: (
        aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=m, scale=0.3)[0]
    ),
    "aten::_scaled_dot_product_efficient_attention": lambda q, k, v, m: aten._scaled_dot_product_efficient_attention(
        q, k, v, m, False, scale=0.3
    )[0],
    "aten::_scaled_dot_product_cudnn_attention": lambda q, k, v, m: aten._scaled_dot_product_cudnn_attention(
        q, k, v, m, False, scale=0.3
    )[0],
    "aten::_scaled_dot_product_fused_attention_overrideable": lambda q, k, v, m: (
        aten._scaled_dot_product_fused_attention_overrideable(q, k, v, m, scale=0.3)[0]
    ),
    "aten::_flash_attention_forward": rows(
        lambda q, k, v: aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False, scale=0.3
        )[0]
    ),
    "aten::_efficient_attention_forward": rows(
        lambda q, k, v: aten._efficient_attention_forward(
            q, k, v, None, None, None, None, None, 0.0, 0, False, scale=0.3
        )[0]
    ),
    "flash_attn::_flash_attn_forward": rows(
        lambda q, k, v: torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False)[0]
    ),
    "flash_attn_3::_flash_attn_forward": rows(
        lambda q, k, v: torch.ops.flash_attn_3._flash_attn_forward(q, k, v, softmax_scale=0.3)[0]
    ),
    "flash_attn_3::fwd": rows(lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=0.3)[0]),
    "_diffusers_flash_attn_3::_flash_attn_forward": rows(
        lambda q, k, v: torch.ops._diffusers_flash_attn_3._flash_attn_forward(q, k, v, softmax_scale=0.3)[0]
    ),
}
MASKED = [name for name in OPS if ATTENTION[name].mask and name != "aten::_efficient_attention_forward"]


def model(attend: Attend, masked: bool) -> Toy:
    """A seeded transformer of two layers with that op; some keys are masked out, if the op can."""

    def layer(part: Part, x: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in part.qkv(norm(x)).chunk(3, dim=-1))
        mask = torch.zeros(1, 1, 1, x.shape[1]).index_fill(3, torch.tensor([2, 5]), -1.0)
        mask = mask.expand(x.shape[0], 2, x.shape[1], x.shape[1]) if masked else None  # type: ignore[assignment]
        x = x + part.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + part.ffn(norm(x))

    torch.manual_seed(0)
    built = Model(layer, layers=2).eval().requires_grad_(False)
    return Toy(lambda x, gate, w, v: built(x), text=False, width=D)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)


@cache
def by_sdpa(masked: bool, keys: str) -> list[Tensor]:
    return trajectory(model(sdpa, masked), refresh_layers=2, keys=keys)


def test_every_entry_is_tested() -> None:
    assert set(ATTENTION) - set(OPS) == {
        "flash_attn::_flash_attn_varlen_forward",
        "flex_attention",
    }


@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_what_sdpa_gives(name: str) -> None:
    ours = model(OPS[name], name in MASKED)
    (attention, *_) = [b for b in ours.structure.branches if b.attention]
    node = next(n for n in ours.normal.graph.nodes if n.name == attention.attention[0])
    assert str(node.target._schema.name) == name
    for keys in ("all", "sampled"):
        found = trajectory(ours, refresh_layers=2, keys=keys)
        torch.testing.assert_close(found, by_sdpa(name in MASKED, keys), rtol=1e-5, atol=1e-5)
    assert repeats(ours, lambda branch: Refresh()) == {}
    scored = ScoredRefresh()
    assert repeats(ours, lambda branch: scored if branch.kind == "ffn" else Refresh()) == {}


def reason(function: Callable[[Tensor], Tensor]) -> str:
    """Why a function of a stream cannot be computed for a part of its tokens."""
    gm = trace(lambda x: function(x.unflatten(-1, (2, -1))), stream())
    with pytest.raises(NoRule) as error:
        follow(gm.graph.nodes, {gm.graph.find_nodes(op="placeholder")[0]: TOKENS})
    return error.value.reason


def test_attention_may_be_causal_where_all_tokens_are_computed_or_none() -> None:
    gm = trace(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), torch.ones(2, 3, 8, 4))
    tokens = Tokens(2, (Segment(TEXT_TOKENS, 0, 3), Segment(IMAGE_TOKENS, 0, 5)))
    seeds = {gm.graph.find_nodes(op="placeholder")[0]: tokens}
    with pytest.raises(NoRule, match="is_causal=True: it depends on the order of the tokens"):
        follow(gm.graph.nodes, seeds, whole={TEXT_TOKENS})
    (*_, attention, _) = gm.graph.nodes
    assert follow(gm.graph.nodes, seeds, whole={TEXT_TOKENS, IMAGE_TOKENS})[attention] == tokens


def test_what_depends_on_the_order_of_tokens_is_refused() -> None:
    two, three = torch.ops.flash_attn, torch.ops.flash_attn_3
    order = "it depends on the order of the tokens"
    assert reason(lambda x: two._flash_attn_forward(x, x, x, 0.0, 1.0, True, -1, -1, 0.0, None, False)[0]) == (
        f"causal=True: {order}"
    )
    assert reason(lambda x: two._flash_attn_forward(x, x, x, 0.0, 1.0, False, 4, -1, 0.0, None, False)[0]) == (
        f"window_size_left=4: {order}"
    )
    assert reason(lambda x: three._flash_attn_forward(x, x, x, attention_chunk=2)[0]) == f"attention_chunk=2: {order}"
    assert reason(lambda x: three.fwd(x, x, x, is_causal=True)[0]) == f"is_causal=True: {order}"
    bias = torch.ones(2)
    assert "and no rule says what that is" in reason(
        lambda x: two._flash_attn_forward(x, x, x, 0.0, 1.0, False, -1, -1, 0.0, bias, False)[0]
    )
    lengths = torch.tensor([0, 8, 16])
    assert "packed end to end" in reason(
        lambda x: two._flash_attn_varlen_forward(x, x, x, lengths, lengths, 8, 8, 0.0, 1.0, False)[0]
    )


def test_results_beside_the_first_are_refused() -> None:
    assert "more of its results" in reason(
        lambda x: (
            torch.ops.flash_attn_3._flash_attn_forward(x, x, x)[0]
            + torch.ops.flash_attn_3._flash_attn_forward(x, x, x)[1].sum()
        )
    )


class Flex(toys.Block):
    """A toy block with flex attention."""

    def __init__(self, mask: BlockMask | None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate, _, _, other = self.modulation(embedding).chunk(6, dim=-1)
        normal = norm_of(x) * (1 + scale) + shift
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(normal).chunk(3, dim=-1))
        mixed = flex_attention(q, k, v, block_mask=self.mask)
        assert isinstance(mixed, Tensor)
        x = x + gate * self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + other * self.down(F.gelu(self.up(norm_of(x))))
        return result


def norm_of(x: Tensor) -> Tensor:
    return F.layer_norm(x, (toys.WIDTH,))


def flex_model(mask: BlockMask | None) -> Any:
    toy = toys.toy(layers=2)
    torch.manual_seed(0)
    toy.blocks = nn.ModuleList(Flex(mask) for _ in range(2)).eval().requires_grad_(False)
    return toy


@pytest.mark.parametrize("made", ["outside", "within"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_cached_but_not_refreshed(made: str) -> None:
    """With a block mask that the model is given, or one that it makes, of all keys."""

    def nearby(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query - key).abs() < 9

    mask = create_block_mask(nearby, 1, 1, toys.TOKENS, toys.TOKENS, device="cpu")
    model = flex_model(mask if made == "outside" else None)
    variants = Variants(
        taylorseer=toys.toy_backend("taylorseer", warmup=2, grid=None),
        hero=toys.toy_backend(warmup=2, refresh_layers=2),
    )
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call, plain = toys.torch_compile(model, variants, fullgraph=True), model(toys.latents(), toys.times(4)[0])
        for policy, backend in variants.backends.items():
            variants.now = policy
            assert torch.equal(toys.loop(call, toys.latents(), toys.times(4))[0], plain)
            assert backend.stats().cached_steps == 1
    fallbacks = variants.backends["hero"].graphs[0].fallbacks
    assert {f.branch for f in fallbacks} == {"l0_attention", "l1_attention"}
    assert all("score_mod, block_mask" in f.reason for f in fallbacks)
