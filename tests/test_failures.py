"""Loud failure: each thing that cannot work is an error that names the mend, or one warning and the plain model."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import hero_fx
from hero_fx.checks import BuildError
from hero_fx.passes.render import op_count

from . import tiny, toys

TIME = toys.times(1)[0]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def backend(**options: Any) -> hero_fx.Backend:
    return hero_fx.backend(**{"inner": tiny.INNER, "grid": toys.GRID, **options})


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))

    def forward(self, latents: Tensor, timestep: Tensor) -> Any:
        return self.layers(latents) * timestep[:, None, None]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(toys.TOKENS, toys.TOKENS, 3, padding=1) for _ in range(3))

    def forward(self, latents: Tensor, timestep: Tensor) -> Any:
        for layer in self.layers:
            latents = latents + layer(latents) * timestep[:, None, None]
        return latents * 2


class WrittenOut(toys.ToyDiT):
    """Attention as a product of queries and keys, and a softmax."""

    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        x = self.first(latents) * timestep[:, None, None]
        for block in self.blocks:
            assert isinstance(block, toys.Block)
            q, k, v = block.qkv(x).chunk(3, dim=-1)
            x = x + (q @ k.transpose(1, 2)).softmax(-1) @ v
            x = x + block.down(block.up(x).relu())
        result: Tensor = self.last(x)
        return result


class BreakBefore(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        latents = latents * 2
        torch._dynamo.graph_break()
        return super().forward(latents, timestep)


class BreakBehind(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        result = super().forward(latents, timestep)
        torch._dynamo.graph_break()
        return result * 2


class BreakBetween(toys.ToyDiT):
    """Not in a loop: there Dynamo would give up on the whole function."""

    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        x, embedding = self.first(latents), self.time(toys.sinusoid(timestep))[:, None]
        x = self.blocks[2](self.blocks[0](x, embedding), embedding)
        torch._dynamo.graph_break()
        result: Tensor = self.last(self.blocks[2](self.blocks[1](x, embedding), embedding))
        return result


class Untimed(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        return super().forward(latents, torch.zeros(2))


class Dropping(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        return super().forward(nn.functional.dropout(latents, 0.0 * self.scale + 0.1, True), timestep)


class Rolling(toys.Block):
    """Its FFN looks at other tokens in a way that the analysis of token axes does not know."""

    def forward(self, x: Tensor, embedding: Tensor) -> Any:
        x = super().forward(x, embedding)
        return x + embedding * self.down(self.up(x).cumsum(dim=1).relu())


def two_blocks(model: Any) -> Callable[..., Any]:
    def call(x: Tensor, timestep: Tensor) -> Any:
        embedding = timestep[:, None, None] * torch.ones(toys.WIDTH)
        return model.blocks[1](model.blocks[0](x, embedding), embedding)

    return call


STREAM = torch.randn(2, toys.TOKENS, toys.WIDTH, generator=torch.Generator().manual_seed(0))
WHOLE = "compile the whole transformer"
BREAK = r"graph break.*torch.compile\(..., fullgraph=True\)"

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "mlp": (lambda: frozen(MLP()), f"no attention or FFN branch was found: .*{WHOLE}"),
    "conv net": (lambda: frozen(ConvNet()), f"no attention was found in the 3 residual branches.*{WHOLE}"),
    "break before": (lambda: frozen(BreakBefore()), BREAK),
    "break between": (lambda: frozen(BreakBetween()), BREAK),
    "break behind": (lambda: frozen(BreakBehind()), BREAK),
    "break in a loop": (lambda: toys.toy(between=torch._dynamo.graph_break), BREAK),
    "training": (lambda: toys.toy().train(), r"model.training=True.*call model.eval\(\)"),
    "one layer": (lambda: toys.toy(layers=1), f"single transformer block.*{WHOLE}"),
    "no time": (lambda: frozen(Untimed()), r"no timestep was found among .*latents.*backend\(timestep='...'\)"),
}


def check_message(call: Callable[[], Any], mend: str, kind: type[Exception] = hero_fx.UnsupportedModel) -> None:
    """The error that the user sees has the whole message, and the kind of the one that was raised."""
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=f"(?s){mend}") as error:
        call()
    assert type(error.value.inner_exception) is kind


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_accelerated(name: str) -> None:
    make, mend = MODELS[name]
    check_message(lambda: toys.torch_compile(make(), backend=backend())(toys.latents(), TIME), mend)


def test_written_out_attention_is_cached_but_not_refreshed() -> None:
    """A product of values with each other tells it; which tokens its softmax goes over, no rule says."""
    torch.manual_seed(0)
    model, time = frozen(WrittenOut()), toys.times(1)[0]
    steps = hero_fx.trace(model, toys.latents(), time, backend=backend(refresh_layers=1))
    assert [branch.kind for branch in steps.structure.branches] == ["attention", "ffn"] * len(model.blocks)
    assert [fallback.branch for fallback in steps.fallbacks] == ["l0_attention"]
    (cached,) = steps.cached
    ops = op_count(cached)
    assert (ops["aten.softmax"], op_count(steps.full)["aten.softmax"]) == (1, len(model.blocks))


@pytest.mark.parametrize("name", MODELS)
def test_not_strict_warns_once_and_runs_the_plain_model(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    lenient = backend(strict=False)
    compiled, times = toys.torch_compile(model, backend=lenient), toys.times(6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = toys.loop(compiled, toys.latents(), times)
    assert toys.same(ours, toys.loop(model, toys.latents(), times))
    assert [str(w.message) for w in caught if "hero_fx compiles this model without step caching" in str(w.message)]
    assert len(caught) == 1
    assert lenient.stats().graphs == 0


def test_dropout_that_is_on() -> None:
    model = frozen(Dropping())
    check_message(lambda: toys.torch_compile(model, backend=backend())(toys.latents(), TIME), r"call model.eval\(\)")


@pytest.mark.parametrize("where", ["parameters", "input", "later call"])
def test_grad_enabled(where: str) -> None:
    model = toys.toy().requires_grad_(where != "input")
    call = toys.torch_compile(model, backend=backend())
    if where == "later call":
        with torch.no_grad():
            call(toys.latents(), TIME)

    def run() -> None:
        with torch.enable_grad():
            call(toys.latents().requires_grad_(where == "input"), TIME)

    check_message(run, r"torch.is_grad_enabled\(\)=True.*call the model under torch.no_grad\(\)")


def test_grad_enabled_but_not_needed() -> None:
    toys.torch_compile(toys.toy(), backend=backend(), fullgraph=True)(toys.latents(), TIME)


@pytest.mark.parametrize("time", [487, 487.0], ids=repr)
def test_timestep_that_is_a_python_number(time: float) -> None:
    mend = r"no timestep was found among .*latents.*called with a Python number for it, pass a tensor"
    check_message(lambda: toys.torch_compile(toys.toy(), backend=backend())(toys.latents(), time), mend)


def test_timestep_that_is_a_changing_python_number() -> None:
    call = toys.torch_compile(toys.toy(), backend=backend(), dynamic=True)
    mend = (
        r"no timestep was found among the graph's inputs latents \(and the Python numbers timestep\); .* pass a tensor"
    )
    check_message(lambda: call(toys.latents(), 487.0), mend)
    torch._dynamo.reset()
    lenient = toys.torch_compile(toys.toy(), backend=backend(strict=False))
    with pytest.warns(UserWarning, match="without step caching: no timestep was found") as caught:
        ours = toys.loop(lenient, toys.latents(), [487.0, 321.0, 123.0])
    assert toys.same(ours, toys.loop(toys.toy(), toys.latents(), [487.0, 321.0, 123.0]))
    assert len(caught) == 1


@pytest.mark.parametrize("timestep", ["tiemstep", 99])
def test_timestep_that_names_nothing(timestep: str | int) -> None:
    mend = f"timestep={timestep!r} names no tensor input of the graph; its tensor inputs are .*timestep.*"
    call = toys.torch_compile(toys.toy(), backend=backend(timestep=timestep))
    check_message(lambda: call(toys.latents(), TIME), mend)


@pytest.mark.parametrize("time", [torch.tensor([True, False]), torch.zeros(2, dtype=torch.complex64)], ids=str)
def test_timestep_of_no_use(time: Tensor) -> None:
    call = toys.torch_compile(toys.toy(), backend=backend())
    with torch.no_grad(), pytest.raises(ValueError, match=r"timestep has dtype .*allowed: a float or an int dtype"):
        call(toys.latents(), time)


def wan() -> Any:
    torch.manual_seed(0)
    model: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=18,
        freq_dim=16,
        ffn_dim=36,
        num_layers=3,
        rope_max_seq_len=32,
    )
    return frozen(model)


def test_regional_compilation() -> None:
    model = wan()
    model.compile_repeated_blocks(backend=hero_fx.backend(inner=tiny.INNER), fullgraph=True)
    kwargs = {"hidden_states": torch.randn(1, 4, 3, 8, 12), "encoder_hidden_states": torch.randn(1, 7, 18)}
    check_message(lambda: model(**kwargs, timestep=TIME[:1]), f"compile_repeated_blocks.*{WHOLE}, torch.compile")


def test_a_block_by_itself() -> None:
    block = toys.toy().blocks[0]
    check_message(
        lambda: toys.torch_compile(block, backend=backend())(STREAM, STREAM[:, :1]), f"single .*block.*{WHOLE}"
    )


def test_some_blocks_by_themselves() -> None:
    call = toys.torch_compile(two_blocks(toys.toy()), backend=backend())
    check_message(lambda: call(STREAM, TIME), f"enters the graph as an input.*leaves it as an output.*{WHOLE}")


MISFITS = {
    "patch": ((3, 2, 3), r"patch=\(3, 2, 3\) is larger than grid=\(2, 3, 5\).*Try patch=\(2, 2, 3\)"),
    "refresh_layers": (3, r"refresh_layers=3 is beyond .*depth of 2 layers; give a count from 0 to 2"),
    "grid": ((2, 3, 4), r"grid=\(2, 3, 4\) holds 24 tokens but the model has 30 image tokens; give .*after patch"),
}


@pytest.mark.parametrize("option", MISFITS)
def test_options_that_do_not_fit_the_model(option: str) -> None:
    value, mend = MISFITS[option]
    call = toys.torch_compile(toys.toy(), backend=backend(**{option: value}))
    check_message(lambda: call(toys.latents(), TIME), mend, ValueError)
    torch._dynamo.reset()
    lenient = toys.torch_compile(toys.toy(), backend=backend(**{option: value}, strict=False))
    with torch.no_grad(), pytest.warns(UserWarning, match=f"(?s)without step caching: {mend}"):
        assert torch.equal(lenient(toys.latents(), TIME), toys.toy()(toys.latents(), TIME))


def test_a_grid_that_the_graph_does_not_show_is_said(caplog: pytest.LogCaptureFixture) -> None:
    hero = backend(grid=None)
    call = toys.torch_compile(toys.toy(), backend=hero, fullgraph=True)
    with caplog.at_level(logging.WARNING, "hero_fx"):
        toys.loop(call, toys.latents(), toys.times(6))
    assert re.search(
        r"30 image tokens could not be read.*runs of 6 tokens.*pass grid=\(frames, height, width\)", caplog.text
    )
    sampler = hero.graphs[0].sampler
    assert sampler is not None
    assert (sampler.grid, sampler.patch) == ((1, 1, 30), (1, 1, 6))
    assert "runs of tokens in a row; pass grid=(frames, height, width) in tokens, 30 in all" in str(
        hero_fx.explain(hero)
    )


def test_a_branch_that_cannot_be_refreshed_is_computed_in_full() -> None:
    model = toys.toy()
    torch.manual_seed(1)
    model.blocks[1] = frozen(Rolling())
    hero = backend(refresh_layers=2, warmup=1)
    call = toys.torch_compile(model, backend=hero, fullgraph=True)
    mend = r"l1_ffn\w* cannot be cached as planned and is computed in full at every step: .*cumsum"
    with pytest.warns(UserWarning, match=mend) as caught:
        ours = toys.loop(call, toys.latents(), toys.times(2))
    assert len(caught) == 1
    plain = toys.loop(model, toys.latents(), toys.times(2))
    assert torch.equal(ours[0], plain[0])
    assert 0 < tiny.worst(ours, plain) < 0.5
    assert [fallback.branch for fallback in hero.graphs[0].fallbacks] == ["l1_ffn_2"]


class Unsized(toys.ToyDiT):
    """Text in front of the image, cut to the length that its mask has: how many tokens, only a value tells."""

    def forward(self, latents: Tensor, timestep: Any, mask: Tensor) -> Any:  # type: ignore[override]
        x, embedding = self.first(latents), self.time(toys.sinusoid(timestep))[:, None]
        count = mask.sum().item()
        torch._check(count >= 2)
        torch._check(count <= 9)
        x = torch.cat([x[:, :9][:, :count], x], 1)
        for block in self.blocks:
            x = block(x, embedding)
        return self.last(x[:, -toys.TOKENS :])


def test_a_number_of_tokens_that_only_values_tell() -> None:
    torch.manual_seed(0)
    model, mask = frozen(Unsized()), torch.tensor([1, 1, 1, 0, 1])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        mend = r"its number of tokens depends on the values of an input.*cut the input to its length before the call"
        call = toys.torch_compile(model, backend=backend(), fullgraph=True)
        check_message(lambda: call(toys.latents(), TIME, mask), mend, ValueError)
        torch._dynamo.reset()
        lenient = toys.torch_compile(model, backend=backend(strict=False), fullgraph=True)
        with torch.no_grad(), pytest.warns(UserWarning, match="without step caching: the residual stream at"):
            ours = lenient(toys.latents(), TIME, mask)
        assert torch.equal(ours, model(toys.latents(), TIME, mask))


INTERNAL = ["_steps", "_compile"]


@pytest.mark.parametrize(
    "error", [AssertionError("no"), KeyError("buf144"), NotImplementedError(), RuntimeError("x")], ids=repr
)
@pytest.mark.parametrize("where", INTERNAL)
def test_a_fault_of_ours_is_a_warning_or_a_clear_error(
    where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(hero_fx.Backend, where, fail)
    model = toys.toy()
    call = toys.torch_compile(model, backend=backend())
    name = type(error).__name__
    mend = rf"hero_fx could not build this model's steps \({name}.*please report it; .*strict=False"
    check_message(lambda: call(toys.latents(), TIME), mend, BuildError)
    torch._dynamo.reset()
    lenient = toys.torch_compile(model, backend=backend(strict=False))
    with torch.no_grad(), pytest.warns(UserWarning, match=rf"without step caching: .*{name}") as caught:
        assert torch.equal(lenient(toys.latents(), TIME), model(toys.latents(), TIME))
    assert len(caught) == 1


class SequenceFirst(toys.Block):
    """An FFN that works on [tokens, batch, width], where a table per token meets it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(toys.TOKENS, 1, toys.WIDTH))

    def forward(self, x: Tensor, embedding: Tensor) -> Any:
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden = self.up(x.transpose(0, 1) * self.table).relu()
        return x + embedding * self.down(hidden).transpose(0, 1)


@pytest.mark.parametrize("batch", [2, toys.TOKENS])
@pytest.mark.parametrize("policy", ["toca", "duca"])
def test_tokens_by_score_where_the_batch_is_not_in_front(policy: str, batch: int) -> None:
    """Computed in full, and said so; also where the batch is as long as the sequence, so that sizes tell nothing."""
    torch.manual_seed(0)
    model = toys.ToyDiT(2)
    model.blocks = nn.ModuleList(SequenceFirst() for _ in range(2))
    frozen(model)
    hero = backend(policy=policy, refresh_ratio=1.0, interval=2, inner="aot_eager")
    call, times, start = toys.torch_compile(model, backend=hero), toys.times(6, batch), toys.latents(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toys.loop(call, start, times)
    said = [re.match(r"hero_fx: (\w+) cannot be cached as planned", str(w.message)) for w in caught]
    assert [found and found[1] for found in said] == ["l0_ffn", "l1_ffn"]
    assert [f.branch for f in hero.graphs[-1].fallbacks] == ["l0_ffn", "l1_ffn"]
    assert hero.stats().cached_steps
