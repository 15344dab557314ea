"""`hero_fx.save` and `hero_fx.load`: step graphs compiled ahead of time run as those compiled live, or refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Plan, Timeline
from hero_fx.warm import load as loading
from hero_fx.warm import save as saving

from .support import toys
from .support.toys import CHANNELS, GRID, WIDTH, latents, torch_compile

ROOT = Path(__file__).parents[1]
STEPS = 7


class Processor:
    """As diffusers' attention processors: no module."""

    heads = 1

    def __init__(self) -> None:
        self.heads = 2


class Told(nn.Module):
    """A toy with arguments that are no tensors, a text, a table of its own, and results by name."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.inner = toys.toy(layers)
        self.read = nn.Linear(WIDTH, CHANNELS)
        self.gains, self.processor = {"a": [1.0]}, Processor()
        self.table = torch.linspace(0, 1, CHANNELS)  # neither parameter nor buffer
        self.eval().requires_grad_(False)

    def forward(
        self, latents: Tensor, timestep: Tensor, text: tuple[Tensor, ...], gain: float = 1.0, return_dict: bool = True
    ) -> Any:
        said = sum(self.read(part).mean(dim=1, keepdim=True) for part in text)
        noise = self.inner(latents + said + self.table, timestep) * gain
        return {"noise": noise, "gain": gain, "given": latents} if return_dict else (noise,)


def told(layers: int = 2) -> Told:
    torch.manual_seed(0)
    return Told(layers)


def text(seed: int = 5, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, length, WIDTH, generator=generator) for length in (3, 5))


@dataclass
class Packages:
    """In place of AOTInductor, which takes ten seconds a graph: packages that name step graphs kept here."""

    graphs: dict[str, Any]

    def compile(self, gm: Any, inputs: list[Tensor], path: Path, **_: Any) -> None:
        name = f"graph {len(self.graphs)}"
        self.graphs[name] = gm
        path.write_text(name)

    def load(self, path: Path) -> Callable[..., list[Tensor]]:
        gm = self.graphs[path.read_text()]
        return lambda *inputs: list(gm(*inputs))


@pytest.fixture(scope="module")
def packages() -> Iterator[None]:
    kept = Packages({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "compile_package", kept.compile)
        patch.setattr(loading, "load_package", kept.load)
        yield


def lanes(call: Callable[..., Any], batch: int = 2, steps: int = STEPS, seed: int = 3, **more: Any) -> list[Tensor]:
    """A closed loop with guidance, the model called once for each branch: every output."""
    x, outputs = latents(batch, seed), []
    texts = text(batch=batch), text(6, batch=batch)
    with torch.no_grad():
        for time in toys.times(steps, batch):
            cond, uncond = (call(x, time, text=own, **more)["noise"] for own in texts)
            outputs += [cond, uncond]
            x = x - (uncond + 2 * (cond - uncond)) / steps
    return outputs


@dataclass
class Saved:
    path: Path
    live: dict[int, list[Tensor]]
    """By batch size, what the live compile gave."""
    stats: hero_fx.Stats


@pytest.fixture(scope="module")
def saved(packages: None, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Two batch sizes of a model in one file."""
    torch._dynamo.reset()
    backend = hero_fx.backend(grid=GRID, num_steps=STEPS, inner="eager")
    compiled = torch_compile(told(), backend, fullgraph=True)
    live = {batch: lanes(compiled, batch) for batch in (2, 1)}
    path = tmp_path_factory.mktemp("warm") / "model.hero"
    hero_fx.save(compiled, path)
    return Saved(path, live, backend.stats())


@pytest.fixture
def loaded(saved: Saved) -> hero_fx.Loaded:
    return hero_fx.load(saved.path, told())


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


def test_a_plan_goes_along(packages: None, tmp_path: Path) -> None:
    torch._dynamo.reset()
    times = toys.times(4)
    timeline = Timeline(
        schedule=(True, True, False, True),
        timesteps=tuple(float(t[0]) for t in times),
        coefficients={"out0": torch.randn(4, 5, 1, 1, CHANNELS, generator=torch.Generator().manual_seed(0))},
    )
    plan = Plan(
        policy="forecast", timelines=(timeline,), outputs=(OutputRule(index=0, axis=2, latent="latents", start=0),)
    )
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


def run(call: Callable[..., Any], **changes: Any) -> Any:
    """One call as it was saved, but for `changes`."""
    with torch.no_grad():
        return call(**{"latents": latents(), "timestep": toys.times(1)[0], "text": text(), **changes})


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"latents": latents(3)}, r"latents f32\[3, 30, 6\]"),
        ({"latents": latents().double()}, r"latents f64\[2, 30, 6\]"),
        ({"gain": 2.0}, r"gain=2\.0"),
        ({"gain": 1}, "gain=1,"),
        ({"gain": torch.ones(())}, r"gain f32\[\]"),
        ({"return_dict": False}, "return_dict=False"),
        ({"text": text()[:1]}, r"text\[0\] f32\[2, 3, 16\], gain"),
        ({"text": list(text())}, r"text\[0\]"),
        ({"text": (text()[0], None)}, r"text\[1\]=None"),
    ],
)  # fmt: skip
def test_another_call_is_refused(loaded: hero_fx.Loaded, changes: dict[str, Any], shown: str) -> None:
    with pytest.raises(ValueError, match=r"no step graphs are saved for this call[\s\S]*but for") as error:
        run(loaded, **changes)
    this, _, others = str(error.value).partition("but for")
    assert re.search(shown, this)
    assert others.count("latents f32") == 2
    assert run(loaded)["noise"].shape == (2, 30, 6)


def test_a_missing_argument_is_the_models_error(loaded: hero_fx.Loaded) -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'timestep'"), torch.no_grad():
        loaded(latents(), text=text())


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


def change_attribute(model: Told) -> None:
    model.inner.scale = 2.0


def change_list(model: Told) -> None:
    model.gains["a"][0] = 2.0


def change_processor(model: Told) -> None:
    model.processor.heads = 3


def train(model: Told) -> None:
    model.train()


def replace_layer(model: Told) -> None:
    model.inner.blocks[0] = toys.Block()


def hook(model: Told) -> None:
    model.inner.first.register_forward_hook(lambda *_: None)


def more_layers(model: Told) -> None:
    model.inner.blocks.append(toys.Block())


def cast(model: Told) -> None:
    model.double()


def other_table(model: Told) -> None:
    model.table = model.table + 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_attribute, r"inner\.scale is 2\.0 here and 1\.0 in the file"),
        (change_list, r"the model\.gains is builtins\.dict\('a': builtins\.list\(2\.0\)\) here"),
        (change_processor, r"the model\.processor is .*Processor\(heads=3\) here"),
        (train, "the model.training is True here and False in the file"),
        (hook, "_forward_hooks"),
        (more_layers, r"inner\.blocks\.2 is .*Block here and missing in the file"),
        (cast, r"inner\.first\.weight is torch\.float64 \[16, 6\].* here and torch\.float32"),
        (other_table, "the model.table is tensor torch.float32"),
    ],
)  # fmt: skip
def test_another_model_is_refused(saved: Saved, change: Callable[[Told], None], reason: str) -> None:
    model = told()
    change(model)
    with pytest.raises(ValueError, match=rf"cannot be loaded: .*{reason}.*Save it anew"):
        hero_fx.load(saved.path, model)


@pytest.mark.parametrize(
    "change",
    [change_attribute, change_list, change_processor, train, replace_layer, hook, more_layers, cast, other_table],
)
def test_a_model_that_changes_after_loading_is_refused(loaded: hero_fx.Loaded, change: Callable[[Told], None]) -> None:
    run(loaded)
    change(loaded._orig_mod)
    with pytest.raises(ValueError, match=r"the model has changed since it was loaded|is torch\.float64"):
        run(loaded)


def test_conditions_count(loaded: hero_fx.Loaded) -> None:
    with pytest.raises(ValueError, match="comes with autocast to bf16 on cpu"), torch.autocast("cpu", torch.bfloat16):
        run(loaded)
    x, said = latents(), text()
    try:
        torch.set_default_dtype(torch.float64)
        with pytest.raises(ValueError, match="default dtype f64"):
            run(loaded, latents=x, text=said)
    finally:
        torch.set_default_dtype(torch.float32)
    loaded.requires_grad_(True)
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\)"):
        loaded(latents(), toys.times(1)[0], text())


def edited(path: Path, to: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of a file with other metadata."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "metadata.json":
                known = json.loads(content)
                edit(known)
                content = json.dumps(known).encode()
            new.writestr(name, content)
    return to


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("torch", "2.12.0", r"torch is '2\.13.*' here and '2\.12\.0' in the file"),
        ("hero_fx", "0.0.9", r"hero_fx is .* '0\.0\.9' in the file"),
        ("python", "3.9", "python is"),
        ("device", "cuda", "device is 'cpu' here and 'cuda' in the file"),
        ("machine", "riscv64", "machine is"),
        ("instructions", {"is": "frozenset", "of": ["avx1024", "sse0"]}, "lacks the instructions avx1024, sse0"),
    ],
)  # fmt: skip
def test_another_place_is_refused(saved: Saved, tmp_path: Path, name: str, value: Any, reason: str) -> None:
    def edit(known: dict[str, Any]) -> None:
        known["environment"]["of"][name] = value
        known["archive"] = "never looked at"

    with pytest.raises(ValueError, match=rf"cannot be loaded: .*{reason}"):
        hero_fx.load(edited(saved.path, tmp_path / "other.hero", edit), told())


def test_other_source_code_is_refused(saved: Saved, tmp_path: Path) -> None:
    def edit(known: dict[str, Any]) -> None:
        sources = known["archive"]["of"]["sources"]["of"]
        assert {name for name, _ in sources} >= {__name__, toys.__name__}
        sources[:] = [[name, "other" if name == toys.__name__ else digest] for name, digest in sources]

    with pytest.raises(ValueError, match=rf"the source code of {toys.__name__} is not what it was"):
        hero_fx.load(edited(saved.path, tmp_path / "other.hero", edit), told())


def test_files_that_are_none(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file; hero_fx\.save"):
        hero_fx.load(tmp_path / "x.hero", told())
    (tmp_path / "x.hero").write_bytes(saved.path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        hero_fx.load(tmp_path / "x.hero", told())
    later = edited(saved.path, tmp_path / "y.hero", lambda known: known.update(version=99))
    with pytest.raises(ValueError, match=r"of version 99, and this hero_fx reads"):
        hero_fx.load(later, told())


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


def test_a_fresh_process_needs_no_compiler(tmp_path: Path) -> None:
    """With AOTInductor itself: an empty cache, and nothing on the path."""
    torch._dynamo.reset()
    compiled, backend = toys.compiled(num_steps=4)
    live = toys.loop(compiled, latents(1), toys.times(4, 1))
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
