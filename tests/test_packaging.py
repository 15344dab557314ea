"""What is shipped: the wheel's contents, and what importing the package does (and does not do)."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, *, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter whose `hero_fx` is the one in `path`."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def source_files() -> list[PurePosixPath]:
    """The files of the checkout that git tracks or would track, relative to its root."""
    if shutil.which("git") is None:
        pytest.skip("needs git to tell source files from others, and there is none")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"needs a git checkout to tell source files from others: {listed.stderr.strip()}")
    names = {PurePosixPath(name) for name in listed.stdout.split("\0") if name}
    return sorted(name for name in names if (ROOT / name).exists())


def modules() -> Iterator[PurePosixPath]:
    """Every module of the checkout, by its path in a wheel."""
    for name in source_files():
        if name.suffix == ".py" and name.parts[0] in ("hero_fx", "passes"):
            yield PurePosixPath("hero_fx", name) if name.parts[0] == "passes" else name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the source files, without network."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in source_files():
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(folder / "wheel"), str(folder / "source")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (folder / "wheel").glob("*.whl")
    return path


def test_wheel_holds_every_module_once_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if ".dist-info/" not in name)
    assert names == sorted([*map(str, modules()), "hero_fx/py.typed"])


def test_wheel_holds_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert b"License-Expression: Apache-2.0\n" in archive.read(metadata)
        licence = archive.read(str(PurePosixPath(metadata).parent / "licenses/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_import_of_the_unpacked_wheel_is_light_and_has_no_side_effects(wheel: Path, tmp_path: Path) -> None:
    """And the passes and the backend, by its name, are those of the wheel: one process for all, for each imports torch."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import logging, warnings
import torch, torch._dynamo  # which torch.compile needs anyway, and which has side effects of its own

def state():
    return (
        torch.initial_seed(), torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.get_default_dtype(), logging.root.level, list(logging.root.handlers), list(warnings.filters),
    )

before = state()
import hero_fx
assert state() == before, "importing hero_fx changed the state of the process"
heavy = {"diffusers", "transformers", "matplotlib", "torch._inductor.compile_fx", "triton", "hero_fx.stability"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
print(hero_fx.stability.Recorder.__name__)  # there without an import of its own

import hero_fx.passes.pipeline
from importlib.metadata import distribution
(entry,) = distribution("hero_fx").entry_points.select(group="torch_dynamo_backends", name="hero_fx")
print(hero_fx.passes.pipeline.__file__)
print(entry.load().__code__.co_filename)
"""
    result = python(code, cwd=tmp_path, path=tmp_path / "site")
    assert result.returncode == 0, result.stderr
    recorder, pipeline, backend = result.stdout.splitlines()
    assert recorder == "Recorder"
    assert Path(pipeline) == tmp_path / "site/hero_fx/passes/pipeline.py"
    assert Path(backend).parent == tmp_path / "site/hero_fx"


def test_passes_refuses_to_be_a_package_of_its_own() -> None:
    result = python("import passes", cwd=ROOT, path=ROOT)
    assert result.returncode == 1
    assert "ImportError: `passes` is part of hero_fx" in result.stderr
    assert "import `hero_fx.passes`" in result.stderr
