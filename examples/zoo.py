"""What hero_fx finds in diffusers' transformers: layers, branches, streams, token grid, and what cannot be refreshed.

    python examples/zoo.py [--models wan,flux] [--json]
    python examples/zoo.py --inner inductor --output zoo.jsonl [--models wan,flux]

Tiny models with random weights (examples/_zoo) are compiled with `fullgraph=True` and `policy="hero"`, all layers
shallow, and run once. "refreshable" counts the branches that can be computed for sampled tokens only; the others are
computed in full at every step, and a note says why. "cached" is the FLOPs of a cached step, attention's included, as a share
of a full step's, with half of the layers shallow. "full step" says whether it gives what the model itself gives. Tokens that
the output is made of are called "image", be they audio, all others "text", be they a reference or the time.

With `--inner` the models run eight steps with default options, `policy="hero"` and `"lean"`, through that compiler. "full
step" is then the largest error to the model itself, "cached step" that to the same graphs run as they are. Rows are appended
to the file of `--output`; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import hero_fx
from _zoo import ZOO, sample
from _zoo_steps import as_step_table, error_of, first_tensor, plain_fails, run_models


def survey(name: str) -> dict[str, Any]:
    """One row: what was found in a model, or why it cannot be compiled as one graph."""
    model = sample(name)
    options: dict[str, Any] = {"inner": "eager", "patch": (1, 1, 2), "timestep": model.time, "grid": model.grid}
    backend = hero_fx.backend(refresh_layers=1.0, **options)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.model, backend=backend, fullgraph=True)
    try:
        ours = first_tensor(compiled(**model.inputs, return_dict=False))
    except Exception as error:
        return {"model": name, "failed": _reason(error), "plain_fails": plain_fails(model, "eager")}
    theirs = first_tensor(model.model(**model.inputs, return_dict=False))
    steps = backend.graphs[-1]
    usual = hero_fx.backend(**options).rewrite(steps)
    structure = steps.structure
    cached = hero_fx.flops(usual.cached[0]).total / hero_fx.flops(usual.normal).total
    return {
        "model": name,
        "layers": structure.depth,
        "branches": dict(Counter(branch.kind for branch in structure.branches)),
        "streams": {s.name: sum(segment.length for segment in s.tokens.segments) for s in structure.streams},
        "grid": structure.grid,
        "refreshable": len(structure.branches) - len(steps.fallbacks),
        "of": len(structure.branches),
        "cached": cached if isinstance(cached, float) else None,  # where sizes depend on the input, so do FLOPs
        "full_step_error": error_of(ours, theirs),
        "fell_back": _by_reason({fallback.branch: fallback.reason for fallback in steps.fallbacks}),
    }


def _by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    """Branches by the reason they share; node names and sizes of single layers are left out."""
    grouped: dict[str, list[str]] = {}
    for branch, reason in reasons.items():
        grouped.setdefault(re.sub(r"^\w+ = ", "", reason), []).append(branch)
    return grouped


def _reason(error: Exception) -> str:
    """The first line of an error, and the code that Dynamo says is its cause."""
    cause = re.search(
        r"^Caused by: (.*?) in \w+ |^ *# File .*?/(\w+\.py\", line \d+).*, code: (.*)$", str(error), re.MULTILINE
    )
    where = " in ".join(part.replace('"', "") for part in reversed(cause.groups()) if part) if cause else ""
    return str(error).strip().splitlines()[0] + (f" ({where})" if where else "")


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows that were found, then a note for each thing that fell back or failed."""
    shown = [
        [
            row["model"],
            row["layers"],
            ", ".join(f"{count} {kind}" for kind, count in row["branches"].items()),
            ", ".join(f"{name} {tokens}" for name, tokens in row["streams"].items()),
            "x".join(map(str, row["grid"])) if row["grid"] else "not shown",
            f"{row['refreshable']} of {row['of']}",
            "varies" if row["cached"] is None else f"{row['cached']:.2f}",
            "equal" if row["full_step_error"] == 0 else f"{row['full_step_error']:.0e}",
        ]
        for row in rows
        if "failed" not in row
    ]
    headers = ["model", "layers", "branches", "streams", "grid", "refreshable", "cached", "full step"]
    notes = [
        f"{row['model']}: {branches[0]}{f' and {len(branches) - 1} more' if len(branches) > 1 else ''}: {reason}"
        for row in rows
        for reason, branches in row.get("fell_back", {}).items()
    ]
    notes += [
        f"{row['model']}: no single graph, {'nor' if row['plain_fails'] else 'but one'} without hero_fx: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    return "\n".join([tabulate(shown, headers=headers, disable_numparse=True), "", *notes])


def main(arguments: list[str] | None = None) -> None:
    """Surveys the models and prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--models", default=",".join(ZOO), help="names, separated by commas")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), help="run steps through this compiler")
    parser.add_argument(
        "--output", type=Path, help="with --inner: append the rows to this file, one JSON object a line"
    )
    given = parser.parse_args(arguments)
    if given.output and not given.inner:
        parser.error("--output: needs --inner")
    names = given.models.split(",")
    unknown = sorted(set(names) - set(ZOO))
    if unknown:
        parser.error(f"--models: unknown {', '.join(unknown)}; there are {', '.join(ZOO)}")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what falls back is in the table
        if given.inner:
            rows, table = run_models(names, given.inner, given.output), as_step_table
        else:
            rows, table = [survey(name) for name in tqdm(names, disable=given.json)], as_table
    print(json.dumps(rows, indent=2) if given.json else table(rows))


if __name__ == "__main__":
    main()
