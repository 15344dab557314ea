"""What a pass is, and the pipeline that runs passes over a graph.

A pass only rewrites. Everything that each pass would otherwise repeat is done here, once: lint, recompile,
timing, op counts, logs, dumps for TORCH_TRACE, and errors that say which pass failed.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule

from .compat import trace_artifact
from .render import graph_diff, op_count, render

__all__ = ["Pass", "PassError", "PassRecord", "Pipeline"]

log = logging.getLogger(__name__)


class Pass(Protocol):
    """A graph rewrite; in this package a frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str:
        """Short and in snake case: it stands in logs, errors and the names of dumps."""
        ...

    def apply(self, gm: GraphModule) -> int:
        """Rewrites `gm.graph` in place; the number of sites rewritten, 0 if the graph is untouched."""
        ...


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did to one graph."""

    pipeline: str
    """Label of the pipeline."""
    name: str
    """Name of the pass."""
    sites: int
    """Sites rewritten, as the pass reports them."""
    seconds: float
    """Wall time of the pass alone, without lint and recompile."""
    op_delta: Counter[str]
    """Calls after minus calls before, by op; ops whose count did not change are left out."""
    nodes_before: int
    nodes_after: int


class PassError(RuntimeError):
    """A pass raised, or left a graph that does not hold together; the original error is its cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """Passes in the order in which they run.

    With `TORCH_LOGS="hero_fx"` every pass logs one line; with `TORCH_LOGS="+hero_fx"` also the diff of its
    graph. With TORCH_TRACE the graph before the first pass and after each pass that changed it is kept as an
    artifact, numbered in pipeline order: `hero_fx_full_00_input`, `hero_fx_full_02_record_features`.
    Otherwise no graph is rendered.
    """

    label: str
    """What the pipeline makes, for logs and dumps: `"full"`, `"cached"`."""
    passes: tuple[Pass, ...]

    def __call__(self, gm: GraphModule) -> tuple[PassRecord, ...]:
        """Runs every pass on `gm`, in place; one record per pass.

        Raises:
            ValueError: a pass found a fault in what the user asked for; a note says which pass.
            PassError: a pass failed in any other way.
        """
        debug = log.isEnabledFor(logging.DEBUG)
        # Where TORCH_TRACE is not set, torch removes its trace handler at the first artifact: names are cheap to render.
        trace_artifact(f"hero_fx_{self.label}_passes", lambda: "\n".join(p.name for p in self.passes))
        text = _render_once(gm)
        trace_artifact(f"hero_fx_{self.label}_00_input", text)
        records: list[PassRecord] = []
        ops = op_count(gm)
        for number, current in enumerate(self.passes, 1):
            before = text() if debug else ""
            record, ops = self._run(number, gm, ops)
            records.append(record)
            title = f"{self.label} {number:02d} {record.name}"
            change = "".join(f", {n:+d} {op}" for op, n in record.op_delta.items())
            log.info("%s: %d sites, %d ms%s", title, record.sites, 1000 * record.seconds, change)
            if record.sites:
                text = _render_once(gm)
                trace_artifact(f"hero_fx_{self.label}_{number:02d}_{current.name}", text)
                if debug:
                    log.debug("%s:\n%s", title, graph_diff(before, text()))
        if any(record.sites for record in records):
            gm.recompile()  # once: passes read the graph alone, and code of a deep model takes a while to write
        return tuple(records)

    def _run(self, number: int, gm: GraphModule, ops_before: Counter[str]) -> tuple[PassRecord, Counter[str]]:
        """Runs pass `number` (from 1) and checks what it left; its record and the new op counts."""
        current, nodes_before = self.passes[number - 1], len(gm.graph.nodes)
        try:
            start = time.perf_counter()
            sites = current.apply(gm)
            seconds = time.perf_counter() - start
            ops, nodes = op_count(gm), len(gm.graph.nodes)
            untouched = (nodes, ops) == (nodes_before, ops_before)
            assert sites or untouched, "it returned 0 but changed the graph"
            if sites:
                gm.graph.lint()
        except ValueError as error:
            error.add_note(f"Raised by pass {self._place(number)}.")
            raise
        except Exception as error:
            raise PassError(f"Pass {self._place(number)}: {type(error).__name__}: {error}") from error
        record = PassRecord(
            pipeline=self.label,
            name=current.name,
            sites=sites,
            seconds=seconds,
            op_delta=_change(ops_before, ops),
            nodes_before=nodes_before,
            nodes_after=nodes,
        )
        return record, ops

    def _place(self, number: int) -> str:
        names = [f"`{p.name}`" for p in self.passes]
        ran = ", ".join(names[: number - 1]) or "no other"
        return f"{names[number - 1]} ({number} of {len(names)} in pipeline `{self.label}`, after {ran})"


def _change(before: Counter[str], after: Counter[str]) -> Counter[str]:
    change = Counter(after)
    change.subtract(before)
    return Counter({op: change[op] for op in sorted(change) if change[op]})


def _render_once(gm: GraphModule) -> Callable[[], str]:
    """Renders the graph as it is when first asked, and never again."""
    return functools.cache(lambda: render(gm))
