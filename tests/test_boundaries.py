"""Boundaries within the project: which way imports go, and where private names of PyTorch may stand."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx

ROOT = Path(__file__).parents[1]
MAY_BE_PRIVATE = {"passes/compat.py", "hero_fx/dynamo.py", "hero_fx/warm/package.py"}

_NODE = fx.Graph().placeholder("x")
PRIVATE_ATTRIBUTES = {"_dynamo_source"} | {
    name
    for of in (_NODE, _NODE.graph, torch.ops.aten.add, torch.ops.aten.add.Tensor, torch.UntypedStorage())
    for name in dir(of)
    if name.startswith("_") and not name.startswith("__")
}


def sources(*folders: str) -> dict[str, ast.Module]:
    """The modules of these folders, by path; not those that a folder only links to."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
        if path.resolve() == ROOT.resolve() / path.relative_to(ROOT)
    }


def imported(module: ast.Module) -> Iterator[str]:
    """The names that a module imports from elsewhere than its own folder, in full."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level != 1:
            assert node.level == 0, "from another folder, imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`torch.fx.Graph` for that expression; names of what is no plain name are left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def private_names(module: ast.Module) -> Iterator[str]:
    """The private names of PyTorch that a module uses."""
    named = [*imported(module)]
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            named.append(dotted(node))
            if node.attr in PRIVATE_ATTRIBUTES and dotted(node.value) not in ("self", "cls"):
                yield dotted(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.append(node.value)
            if node.value in PRIVATE_ATTRIBUTES:  # getattr(x, "_schema")
                yield node.value
    yield from (name for name in named if re.fullmatch(r"torch(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*", name))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from torch._dynamo.source import LocalSource", ["torch._dynamo.source.LocalSource"]),
        ("import torch._inductor", ["torch._inductor"]),
        ("torch.fx._lazy_graph_module.x()", ["torch.fx._lazy_graph_module.x", "torch.fx._lazy_graph_module"]),
        ("node.target._schema", ["node.target._schema"]),
        ("getattr(node, '_dynamo_source', None)", ["_dynamo_source"]),
        ("name == 'torch._functorch.predispatch'", ["torch._functorch.predispatch"]),
        ("self._name = torch.fx.Graph()", []),
        ("raise ValueError('see torch._dynamo.config')", []),
    ],
)
def test_private_names_are_seen(code: str, found: list[str]) -> None:
    assert list(private_names(ast.parse(code))) == found


def test_private_names_of_torch_stand_in_two_modules() -> None:
    modules = sources("hero_fx", "passes")
    assert set(modules) >= MAY_BE_PRIVATE
    found = {path: sorted(set(private_names(modules[path]))) for path in modules.keys() - MAY_BE_PRIVATE}
    assert {path: names for path, names in found.items() if names} == {}


def test_passes_import_nothing_of_hero_fx_but_passes() -> None:
    modules = sources("passes")
    assert len(modules) > 30
    found = {
        path: [name for name in imported(module) if re.match(r"hero_fx\b", name)] for path, module in modules.items()
    }
    upward = {path: [name for name in names if not name.startswith("hero_fx.passes")] for path, names in found.items()}
    assert {path: names for path, names in upward.items() if names} == {}
