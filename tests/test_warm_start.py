"""`hero_fx.save` and `hero_fx.load`: step graphs compiled ahead of time run as those compiled live."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Plan, Timeline
from hero_fx.warm import save as saving
from hero_fx.warm.package import compile_package

from .support import toys
from .support.toys import CHANNELS, GRID, latents, torch_compile
from .support.warm import STEPS, Saved, lanes, packages_in_memory, run, save_two_sizes, text, told

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    with packages_in_memory():
        yield save_two_sizes(tmp_path_factory.mktemp("warm") / "model.hero")


@pytest.fixture
def loaded(saved: Saved) -> hero_fx.Loaded:
    return hero_fx.load(saved.path, told())


@pytest.fixture
def packages() -> Iterator[None]:
    with packages_in_memory():
        yield


def test_each_resolution_runs_as_it_did_live(saved: Saved, loaded: hero_fx.Loaded) -> None:
    counters.clear()
    for batch, outputs in saved.live.items():
        for ours, theirs in zip(lanes(loaded, batch), outputs, strict=True):
            assert torch.equal(ours, theirs)
    assert not counters
    assert loaded.backend.stats() == saved.stats


def test_what_is_no_tensor_comes_back_too(loaded: hero_fx.Loaded) -> None:
    x = latents()
    with torch.no_grad():
        result = loaded(x, timestep=toys.times(1)[0], text=text())
    assert list(result) == ["noise", "gain", "given"]
    assert result["given"] is x
    assert result["gain"] == 1.0


def test_sessions_are_apart(saved: Saved, loaded: hero_fx.Loaded) -> None:
    def of(session: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with hero_fx.session(session):
                return loaded(*args, text=text())["noise"]

        return call

    starts, times = [latents(), latents(seed=4)], toys.times(STEPS)
    alone = [toys.loop(of(f"alone {i}"), start, times) for i, start in enumerate(starts)]
    together = toys.in_turns([of("a"), of("b")], starts, times)
    for ours, theirs in zip(together, alone, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert loaded.backend.stats().sessions == 4
    hero_fx.session("a").drop()
    assert loaded.backend.stats().sessions == 3


def test_weights_are_the_models_own(saved: Saved) -> None:
    other = told()
    for parameter in other.parameters():
        parameter.mul_(1.1)
    loaded = hero_fx.load(saved.path, other)
    torch._dynamo.reset()
    backend = hero_fx.backend(grid=GRID, num_steps=STEPS, inner="eager")
    live = lanes(torch_compile(other, backend, fullgraph=True))
    assert all(map(torch.equal, lanes(loaded), live))
    assert not torch.equal(live[0], saved.live[2][0])
    other.inner.first.weight = nn.Parameter(torch.zeros_like(other.inner.first.weight), requires_grad=False)
    assert not torch.equal(lanes(loaded)[0], live[0])


def test_attributes_are_the_models(loaded: hero_fx.Loaded) -> None:
    model = loaded._orig_mod
    assert loaded.table is model.table
    assert not loaded.training
    assert all(ours is theirs for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True))
    loaded.note = 2.0
    assert model.note == 2.0
    steps = hero_fx.trace(loaded, latents(), toys.times(1)[0], text())  # by the options of the file
    assert steps.sampler is not None
    assert steps.sampler.grid == GRID


@pytest.mark.parametrize("parts", [(), ((True, False, False, True), (True, True, False, True))])
def test_a_plan_goes_along(packages: None, parts: tuple[tuple[bool, ...], ...], tmp_path: Path) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    tables = {
        name: torch.randn(4, 5, 1, 1, CHANNELS, generator=generator) for name in ("out0", "out0@1")[: len(parts) or 1]
    }
    times = toys.times(4)
    timeline = Timeline(
        schedule=(True, True, False, True),
        timesteps=tuple(float(t[0]) for t in times),
        coefficients=tables,
        parts=parts,
    )
    rule = OutputRule(index=0, axis=2, latent="latents", start=0)
    plan = Plan(policy="forecast", timelines=(timeline,), outputs=(rule,), batch=2)
    backend = hero_fx.backend(plan=plan, inner="eager")
    compiled = torch_compile(toys.toy(), backend)
    live = toys.loop(compiled, latents(), times)
    hero_fx.save(compiled, tmp_path / "planned.hero")
    loaded = hero_fx.load(tmp_path / "planned.hero", toys.toy())
    assert all(map(torch.equal, toys.loop(loaded, latents(), times), live))
    assert loaded.backend.stats() == backend.stats()
    loaded.backend.reset()
    with pytest.raises(RuntimeError, match="another number of steps"):
        toys.loop(loaded, latents(), toys.times(3))


def test_one_tensor_twice_is_another_call(packages: None, tmp_path: Path) -> None:
    torch._dynamo.reset()
    one = text()[1]
    compiled = torch_compile(told(), hero_fx.backend(grid=GRID, inner="eager"))
    live = run(compiled, text=(one, one))["noise"]
    hero_fx.save(compiled, tmp_path / "same.hero")
    loaded = hero_fx.load(tmp_path / "same.hero", told())
    assert torch.equal(run(loaded, text=(one, one))["noise"], live)
    with pytest.raises(ValueError, match=r"text\[1\] is text\[0\]"):
        run(loaded, text=(one, one.clone()))


def test_strides_are_no_other_call(saved: Saved, loaded: hero_fx.Loaded) -> None:
    turned = latents().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(loaded, latents=turned)["noise"], run(loaded)["noise"])


class Noting(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        self.noted = latents
        return super().forward(latents, timestep)


class Boxed:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Boxing(toys.ToyDiT):
    def forward(self, latents: Tensor, timestep: Any) -> Any:
        return Boxed(super().forward(latents, timestep))


def test_what_cannot_be_saved(packages: None, tmp_path: Path) -> None:
    torch._dynamo.reset()
    path = tmp_path / "x.hero"
    with pytest.raises(ValueError, match="compiled=ToyDiT is no module that was compiled with hero_fx"):
        hero_fx.save(toys.toy(), path)
    compiled, _ = toys.compiled()
    with pytest.raises(ValueError, match="call the compiled model once, then save"):
        hero_fx.save(compiled, path)
    for kind, reason in (
        (Noting, r"a call of the model changes the model.*the model\.noted is"),
        (Boxing, "returns a .*Boxed"),
    ):
        model = kind(2).eval().requires_grad_(False)
        compiled, _ = toys.compiled(model)
        with torch.no_grad():
            compiled(latents(), toys.times(1)[0])
        with pytest.raises(ValueError, match=reason):
            hero_fx.save(compiled, path)
    assert not path.exists()


def test_under_inference_mode_and_compiled_in_place(packages: None, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model: Any = toys.toy()
    model.compile(backend=hero_fx.backend(grid=GRID, inner="eager"))
    with torch.inference_mode():
        live = model(latents(), toys.times(1)[0])
        hero_fx.save(model, tmp_path / "x.hero")
        loaded = hero_fx.load(tmp_path / "x.hero", toys.toy())
        assert torch.equal(loaded(latents(), toys.times(1)[0]), live)


def test_under_autocast(packages: None, tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled, _ = toys.compiled()
    with torch.autocast("cpu", torch.bfloat16):
        live = toys.loop(compiled, latents(), toys.times(4))
        hero_fx.save(compiled, tmp_path / "x.hero")
        loaded = hero_fx.load(tmp_path / "x.hero", toys.toy())
        assert all(map(torch.equal, toys.loop(loaded, latents(), toys.times(4)), live))
    with pytest.raises(ValueError, match=r"is saved for autocast to bf16 on cpu.*comes with no autocast"):
        toys.loop(loaded, latents(), toys.times(1))


def test_a_graph_that_no_call_reaches_is_left_out(packages: None, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = toys.toy()
    compiled, _ = toys.compiled(model)
    toys.loop(compiled, latents(), toys.times(1))
    model.scale = 3.0
    live = toys.loop(compiled, latents(), toys.times(1))
    with pytest.warns(UserWarning, match=r"hero_fx\.save leaves out a graph: another graph, compiled later"):
        hero_fx.save(compiled, tmp_path / "x.hero")
    loaded = hero_fx.load(tmp_path / "x.hero", toys.toy(scale=3.0))
    assert torch.equal(toys.loop(loaded, latents(), toys.times(1))[0], live[0])
    model.scale = 4.0
    with pytest.raises(ValueError, match="Dynamo would compile the model anew"):
        hero_fx.save(compiled, tmp_path / "x.hero")


FRESH = """
import sys
import torch
from torch._dynamo.utils import counters
import hero_fx
from tests.support import toys

torch.set_num_threads(1)
loaded = hero_fx.load(sys.argv[1], toys.toy())
outputs = toys.loop(loaded, toys.latents(1), toys.times(4, 1))
assert not counters, counters
torch.save(outputs, sys.argv[2])
"""


QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
"""For a C++ compiler that is to compile two small graphs, once."""


def test_a_fresh_process_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AOTInductor itself: an empty cache, and nothing on the path."""
    monkeypatch.setattr(saving, "compile_package", compile_package)  # whatever other tests hold in memory
    torch._dynamo.reset()
    compiled, backend = toys.compiled(num_steps=4)
    live = toys.loop(compiled, latents(1), toys.times(4, 1))
    with torch._inductor.config.patch(QUICK):
        hero_fx.save(compiled, tmp_path / "toy.hero")
    cache = tmp_path / "cache"
    cache.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("CXX", "CC")},
        "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "toy.hero"), str(tmp_path / "outputs.pt")],
        env=environment, cwd=ROOT, check=True,
    )  # fmt: skip
    assert not any(cache.iterdir())
    assert backend.stats().cached_steps == 1
    for ours, theirs in zip(torch.load(tmp_path / "outputs.pt"), live, strict=True):
        torch.testing.assert_close(ours, theirs)
