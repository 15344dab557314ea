"""One step graph, compiled ahead of time by AOTInductor, and loaded again. All of its private API is used here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from hero_fx import dynamo
from hero_fx.passes import compat

__all__ = ["compile_package", "load_package"]


def compile_package(
    gm: fx.GraphModule, inputs: Sequence[Tensor], path: Path, *, mode: str | None, options: Mapping[str, Any] | None
) -> None:
    """Inductor's inference compilation of `gm` for `inputs`, whose values do not matter, into a file.

    CUDA graphs, which modes and options may ask for, cannot be part of it.
    """

    def compiled(more: Mapping[str, Any]) -> None:
        patches = {**torch._TorchCompileInductorWrapper(mode, dict(options or {}), False).config, **more}
        kept = {name: value for name, value in patches.items() if "cudagraph" not in name}
        with warnings.catch_warnings(), torch.no_grad(), compat.no_autocast():
            # PyTorch warns of itself where it copies a graph (2.13).
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            program = torch.export.export(gm, tuple(inputs), strict=False)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=kept)

    dynamo.around_fusion_defect(compiled)


def load_package(path: Path) -> dynamo.Compiled:
    """What `compile_package` wrote, as a function of the same inputs that returns a list of tensors.

    `torch._inductor.aoti_load_package` would find out with a C++ compiler which vector instructions there are, to compare
    them with those of the package. That takes seconds, and nothing where there is no compiler; `Environment` compares them
    without.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def run(*inputs: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = loader.boxed_run(list(inputs))
        return outputs

    return run
