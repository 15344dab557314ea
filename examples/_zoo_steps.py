"""Runs a model of the zoo through a compiler, full and cached steps, and compares: what `examples/zoo.py --inner` prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm

import hero_fx
from _zoo import Sample, sample

POLICIES = ("hero", "lean")
STEPS = 8
"""By default steps 3, 5 and 7 are cached."""

Row = dict[str, Any]


def first_tensor(value: Any) -> Tensor:
    """The first tensor of a model's output."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def error_of(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def run_models(names: Iterable[str], inner: str, output: Path | None) -> list[Row]:
    """A row per model and policy.

    With `output`, rows are appended to it as they are made; those there are not made again, unless they failed.
    """
    done = read_rows(output) if output else []
    known = {(row["model"], row["policy"], row["inner"]): row for row in done if "failed" not in row}
    wanted = [(name, policy, inner) for name in names for policy in POLICIES]
    with tqdm(wanted, desc=inner, disable=None) as bar:
        for key in bar:
            if key in known:
                continue
            bar.set_postfix_str(f"{key[0]}, {key[1]}")
            known[key] = run_model(*key)
            if output:
                with output.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
    return [known[key] for key in wanted]


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_model(name: str, policy: str, inner: str) -> Row:
    """Default options, but for patches that are no larger than the grid."""
    row: Row = {"model": name, "policy": policy, "inner": inner}
    model = sample(name)
    try:
        row |= _compare(model, _options(model, policy), inner)
    except Exception as error:
        row |= {"failed": str(error).strip().splitlines()[0], "plain_fails": plain_fails(model, inner)}
    return row


def plain_fails(model: Sample, inner: str) -> bool:
    """Whether plain torch.compile cannot make one graph of the model either, or not compile it."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.model, backend=inner, fullgraph=True)
    try:
        with torch.no_grad():
            compiled(**model.inputs, return_dict=False)
    except Exception:
        return True
    return False


def _options(model: Sample, policy: str) -> dict[str, Any]:
    """`policy="fora"`, which needs no grid, finds the model's."""
    found = hero_fx.backend("fora", inner="eager", timestep=model.time)
    _compiled(model, found)(0)
    structure = found.graphs[0].structure
    grid = model.grid or structure.grid or (1, 1, structure.image_tokens)
    patch = tuple(map(min, (1, 2, 3), grid))
    return {"policy": policy, "timestep": model.time, "grid": model.grid, "patch": patch}


def _compiled(model: Sample, backend: Any) -> Callable[[int], Tensor]:
    """The model's first output at a step, through torch.compile."""
    torch._dynamo.reset()
    counters.clear()
    call: Any = torch.compile(model.model, backend=backend, fullgraph=True)

    def run(step: int) -> Tensor:
        with torch.no_grad():
            return first_tensor(call(**model.at(step / STEPS), return_dict=False)).clone()

    return run


def _compare(model: Sample, options: dict[str, Any], inner: str) -> Row:
    backends = [hero_fx.backend(inner=kind, **options) for kind in ("eager", inner)]
    run = _compiled(model, backends[0])
    as_they_are = [run(step) for step in range(STEPS)]
    run = _compiled(model, backends[1])
    start = time.perf_counter()
    outputs = [run(0)]
    compiled = time.perf_counter()
    outputs += [run(step) for step in range(1, STEPS)]
    end = time.perf_counter()
    schedule, stats = backends[1].config.make_schedule(), backends[1].stats()
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())  # Dynamo's own count
    errors: dict[bool, list[float]] = {True: [], False: []}
    for step, output in enumerate(outputs):
        full = schedule.is_full(step)
        with torch.no_grad():
            plain = (
                first_tensor(model.model(**model.at(step / STEPS), return_dict=False)) if full else as_they_are[step]
            )
        errors[full].append(error_of(output, plain))
    assert (stats.full_steps, stats.cached_steps) == (len(errors[True]), len(errors[False])), stats
    return {
        "full_step_error": max(errors[True]),
        "cached_step_error": max(errors[False]),
        "graphs": graphs,
        "breaks": breaks,
        "recompiles": graphs - 1,
        "compile_seconds": round(compiled - start, 1),
        "step_seconds": round((end - compiled) / (STEPS - 1), 3),
    }


def as_step_table(rows: list[Row]) -> str:
    """A line per model and policy, then those that failed."""
    headers = ["model", "policy", "full step", "cached step", "graphs", "breaks", "recompiles", "compile s", "step s"]
    shown = [
        [
            row["model"],
            row["policy"],
            *(f"{row[kind]:.0e}" if row[kind] else "equal" for kind in ("full_step_error", "cached_step_error")),
            *(row[kind] for kind in ("graphs", "breaks", "recompiles", "compile_seconds", "step_seconds")),
        ]
        for row in rows
        if "failed" not in row
    ]
    notes = [
        f"{row['model']}, {row['policy']}: fails{' without hero_fx too' if row['plain_fails'] else ''}: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    return "\n".join([tabulate(shown, headers=headers), "", *notes])
