"""Preconditions of step caching: each error says how to fix it; without `strict`, one warning and the plain model."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import hero_fx
from hero_fx.checks import BuildError

from .support import tiny, toys
from .support.unsupported import MODELS, TIME, WHOLE, backend, check_message, frozen

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Dropping(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        return super().forward(nn.functional.dropout(latents, 0.0 * self.scale + 0.1, True), timestep)


def two_blocks(model: Any) -> Callable[..., Any]:
    def call(x: Tensor, timestep: Tensor) -> Any:
        embedding = timestep[:, None, None] * torch.ones(toys.WIDTH)
        return model.blocks[1](model.blocks[0](x, embedding), embedding)

    return call


STREAM = torch.randn(2, toys.TOKENS, toys.WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_accelerated(name: str) -> None:
    make, fix = MODELS[name]
    check_message(lambda: toys.torch_compile(make(), backend=backend())(toys.latents(), TIME), fix)


LENIENT = ("mlp", "break between", "break behind", "training", "no time")
"""With `strict=False` all of them take one way; these run it by default."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in LENIENT else pytest.mark.exhaustive) for name in MODELS]
)
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
    value, fix = MISFITS[option]
    call = toys.torch_compile(toys.toy(), backend=backend(**{option: value}))
    check_message(lambda: call(toys.latents(), TIME), fix, ValueError)
    torch._dynamo.reset()
    lenient = toys.torch_compile(toys.toy(), backend=backend(**{option: value}, strict=False))
    with torch.no_grad(), pytest.warns(UserWarning, match=f"(?s)without step caching: {fix}"):
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


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("_steps", KeyError("buf144")),
        ("_compile", NotImplementedError()),
        pytest.param("_steps", AssertionError("no"), marks=pytest.mark.exhaustive),
        pytest.param("_compile", RuntimeError("x"), marks=pytest.mark.exhaustive),
    ],
    ids=repr,
)
def test_a_fault_of_ours_is_a_warning_or_a_clear_error(
    where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(hero_fx.Backend, where, fail)
    model = toys.toy()
    call = toys.torch_compile(model, backend=backend())
    name = type(error).__name__
    fix = rf"hero_fx could not build this model's steps \({name}.*please report it; .*strict=False"
    check_message(lambda: call(toys.latents(), TIME), fix, BuildError)
    torch._dynamo.reset()
    lenient = toys.torch_compile(model, backend=backend(strict=False))
    with torch.no_grad(), pytest.warns(UserWarning, match=rf"without step caching: .*{name}") as caught:
        assert torch.equal(lenient(toys.latents(), TIME), model(toys.latents(), TIME))
    assert len(caught) == 1
