"""README and docs: every code block is run, checked or compared, every link leads somewhere, tables say what the code says."""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hero_fx

ROOT = Path(__file__).parents[1]
MODELS = [f"examples/{model}{folder}" for model in ("world", "shapes") for folder in ("", "/weights")]
PAGES = sorted(page for folder in (".", "docs", "docs/api", *MODELS) for page in (ROOT / folder).glob("*.md"))
README = ROOT / "README.md"
OUTPUTS = ("text", "diff")
BUILT = ("{eval-rst}", "{include}", "{toctree}")
"""Blocks that the build of the docs executes, with warnings as errors."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its first line, from 1."""
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def runs(self) -> bool:
        return self.info == "python"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, opened = [], None
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = (number, line.strip("` "))
        else:
            first, info = opened
            found.append(Block(page, first + 1, info, "\n".join(lines[first : number - 1]) + "\n"))
            opened = None
    assert opened is None, f"{name_of(page)}: the block that begins on line {opened} is never closed"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = sorted({block.page for block in BLOCKS if block.runs})


def test_no_block_is_left_out() -> None:
    """Each is of a kind that a test here, or the build of the docs, takes care of."""
    for block in BLOCKS:
        place = f"{name_of(block.page)}:{block.line}"
        if block.info == "python checked":  # by mypy alone: nothing here can download a model
            assert "from_pretrained" in block.text, f"{place} could run"
        else:
            assert block.info in ("python", "sh", *OUTPUTS) or block.language in BUILT, f"{place}: {block.info!r}"


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What the pages import is found, and what they write goes elsewhere."""
    for folder in ("docs", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    hero_fx.reset()


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_examples_run_and_print_what_the_page_shows(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`EXPECTTEST_ACCEPT=1` writes what they print into the page."""
    module = ModuleType(f"page_{page.stem}")  # Dynamo looks names up in the module of a function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed: Block | None = None
    out, shown = "", []
    for block in blocks_of(page):
        if block.runs:
            assert printed is None or not out, f"{name_of(page)}:{printed.line} prints what is not shown"
            with redirect_stdout(StringIO()) as stream:
                code = "\n" * (block.line - 1) + block.text  # so that tracebacks name the line of the page
                exec(compile(code, str(page), "exec", dont_inherit=True), vars(module))
            printed, out = block, "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())
        elif block.language in OUTPUTS:
            assert printed is not None, f"{name_of(page)}:{block.line} shows what no example prints"
            shown.append((block, out))
            out = ""
    assert not out, f"{name_of(page)}: its last example prints what is not shown"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        accept(page, shown)
    else:
        for block, out in shown:
            flags = doctest.ELLIPSIS if block.language == "text" else 0  # diffs have dots of their own
            same = doctest.OutputChecker().check_output(block.text, out, flags)
            assert same, f"{name_of(page)}:{block.line} shows\n{block.text}\nand this was printed:\n{out}"


def accept(page: Path, shown: list[tuple[Block, str]]) -> None:
    """Writes what was printed into the page; a block with an ellipsis of its own stays."""
    lines = page.read_text().splitlines()
    for block, out in reversed(shown):
        if not re.search(r"^\.\.\.|\S \.\.\.", block.text, re.MULTILINE):
            lines[block.line - 1 : block.line - 1 + len(block.text.strip("\n").splitlines())] = out.splitlines()
    page.write_text("\n".join(lines) + "\n")


def test_examples_have_the_types_that_they_say(tmp_path: Path) -> None:
    """All pages in one run of mypy; of PyTorch nothing is known, which makes it quick."""
    for page in {block.page for block in BLOCKS if block.language == "python"}:
        lines: list[str] = []
        for block in blocks_of(page):
            if block.language == "python":
                lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
        name = re.sub(r"\W", "_", name_of(page))
        (tmp_path / f"{name}.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\ncheck_untyped_defs = true\nwarn_unreachable = true\nignore_missing_imports = true\n"
        "[mypy-torch.*,diffusers.*,numpy.*]\nfollow_imports = skip\n[mypy-hero_fx.*,world.*,shapes.*]\nfollow_imports = silent\n"
    )
    folders = os.pathsep.join(str(ROOT / folder) for folder in (".", "docs", "examples"))
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "."],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.info == "sh"], ids=lambda b: f"{name_of(b.page)}:{b.line}")
def test_commands_name_files_and_options_that_exist(block: Block) -> None:
    for line in block.text.splitlines():
        for command in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
            if command:
                check_command(shlex.split(command))


def check_command(words: list[str]) -> None:
    """Fails for a file, an extra or an option that does not exist."""
    while "=" in words[0]:  # the environment
        name, _, value = words[0].partition("=")
        if name == "HERO_FX":
            hero_fx.backend(**json.loads(value))
        words = words[1:]
    program, *rest = words
    if program in ("sglang", "vllm"):
        return  # theirs; what is ours is in the environment
    if program == "pip":
        assert rest[0] == "install"
        options = [word for word in rest if word != "--no-compile"]
        assert options[1] == "-c"
        assert (ROOT / options[2]).is_file()
        extras = re.fullmatch(r"\.\[([\w,-]+)\]", rest[-1])
        assert extras is not None, rest[-1]
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(extras[1].split(",")) <= set(known)
        return
    assert program in ("python", "pytest", "bash", "ruff", "mypy", "sphinx-build"), (
        f"{program!r}: a command of another kind"
    )
    paths = [word for word in rest if "/" in word or word.endswith((".py", ".md"))]
    for path in paths:
        assert (ROOT / path.partition("::")[0]).exists() or path.startswith("build/"), f"{path} does not exist"
    if program == "python":
        script = (ROOT / rest[0]).read_text()
        for name in set(re.findall(r"^(?:import|from) (_\w+)", script, re.MULTILINE)):
            shared = ROOT / "examples" / f"{name}.py"
            files = [shared] if shared.is_file() else sorted((ROOT / "examples" / name).glob("*.py"))
            script += "".join(path.read_text() for path in files)
        for option in (word for word in rest[1:] if word.startswith("--")):
            assert f'"{option}"' in script, f"{rest[0]} has no option {option}"


def slug(heading: str) -> str:
    """The anchor of a heading, as browsers of repositories and the docs make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{name_of(page)} links to {target}, and there is no such file"
        assert not anchor or anchor in anchors(path), f"{name_of(page)} links to {target}, which has no such heading"


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading, header and rule left out."""
    section = page.read_text().partition(f"\n## {heading}\n")[2]
    rows = takewhile(lambda line: line.startswith("|"), section[section.index("\n|") + 1 :].splitlines())
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][2:]


def test_readme_fits_on_two_screens_and_has_the_two_commands() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert 'pip install --no-compile -c constraints.txt -e ".[examples]" && python examples/quickstart.py\n' in text
    assert 'pip install -c constraints.txt -e ".[test]" && pytest\n' in text


def test_readme_names_options_with_their_defaults() -> None:
    known = {option.name: option for option in fields(hero_fx.Config)}
    rows = table_rows(README, "Options")
    assert len(rows) > 8
    for name, default, _ in rows:
        assert eval(default.strip("`")) == known[name.strip("`")].default, name


def test_readme_names_every_policy() -> None:
    policies = " ".join(row[1] for row in table_rows(README, "Which policy"))
    for policy in ("hero", "lean", "fora", "taylorseer", "toca", "duca", "forecast", "full"):
        assert f'"{policy}"' in policies


def test_architecture_lists_every_folder_of_code() -> None:
    listed = {row[0].strip("`").rstrip("/") for row in table_rows(ROOT / "docs/architecture.md", "Folders")}
    assert all((ROOT / path).exists() for path in listed)
    packages = {name_of(file.parent) for top in ("hero_fx", "passes") for file in (ROOT / top).glob("*/__init__.py")}
    assert packages - {"hero_fx/passes"} <= listed


def test_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/api/hero_fx.md").read_text()
    documented = re.findall(r"^\.\. auto\w+:: hero_fx\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(hero_fx.__all__)
