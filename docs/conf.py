"""How Sphinx builds the documentation: `sphinx-build -W -c docs . OUT`. Nothing is written beside the sources.

The root of the repository is the root of the pages, so that a link leads to the same place in both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

project = "hero_fx"
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**",
    *(f"examples/{model}/{page}" for model in ("world", "shapes") for page in ("*.md", "weights/*.md")),
    "examples/world/results/*/*.md",
]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "hero_fx"
html_copy_source = False
html_show_sourcelink = False

myst_heading_anchors = 3  # links to headings, as browsers of repositories have them
suppress_warnings = [
    "ref.python",  # names in types are short, and some are those of several classes
]

default_role = "literal"  # docstrings have code in single backticks
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


def modules_of(folder: str) -> list[str]:
    """The modules in a folder, by the names that they are imported by."""
    # `compat` hands on private names of torch: nothing to refer to.
    files = sorted(file for file in (ROOT / folder).glob("*.py") if file.stem not in ("__init__", "compat"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [f"hero_fx.{name}" if name.startswith("passes.") else name for name in names]


def write_out_modules(app: Any, page: str, source: list[str]) -> None:
    """A line `@modules passes/normalize` of a page stands for the docstrings of all modules in that folder."""

    def blocks(line: re.Match[str]) -> str:
        return "\n".join(
            f"### {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in modules_of(line[1])
        )

    source[0] = re.sub(r"^@modules (\S+)$", blocks, source[0], flags=re.MULTILINE)


def keep_first_colon(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Napoleon would take what stands in front of the first colon of a field's docstring for its type."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", write_out_modules)
    app.connect("autodoc-process-docstring", keep_first_colon, priority=400)  # Napoleon has 500
