"""What `hero_fx.load` and calls of what it returns refuse: other models, other places, other calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hero_fx

from .support import toys, warm
from .support.toys import latents
from .support.warm import Saved, Told, edited, packages_in_memory, run, save_two_sizes, text, told


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    with packages_in_memory():
        yield save_two_sizes(tmp_path_factory.mktemp("warm") / "model.hero")


@pytest.fixture
def loaded(saved: Saved) -> hero_fx.Loaded:
    return hero_fx.load(saved.path, told())


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
    model: Any = loaded._orig_mod
    change(model)
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
        assert {name for name, _ in sources} >= {warm.__name__, toys.__name__}
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
