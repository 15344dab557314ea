"""A graph for some rows of its batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from hero_fx.passes.analysis.batch_rows import BATCH, follow_batch
from hero_fx.passes.emit import Emitter, value_of

from .forecast import outputs_of
from .keep import Rows
from .subset import Subset
from .subset_ops import emit

__all__ = ["KeepRows"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepRows:
    """Computes some rows of the batch, which an input names: the conditional half of classifier-free guidance, say.

    Before, for a batch of 2::

        x: f32[2, 6, 4] = input
        linear: f32[2, 6, 4] = aten.linear.default(x, weight)
        return (linear,)

    After, for one row of it (dead code is removed by a later pass)::

        x: f32[2, 6, 4] = input
        rows: i64[1] = input
        index_select: f32[1, 6, 4] = aten.index_select.default(x, 0, rows)
        linear: f32[1, 6, 4] = aten.linear.default(index_select, weight)
        return (linear,)

    Legal because `follow_batch` has shown of every op that a row of its result comes from the same row of its inputs: what
    the graph returns are these rows of what it returned, up to the rounding of smaller products. Rows are kept as a refresh
    keeps tokens (`Subset`): inputs, and tables that have rows, are gathered by the same indices.
    """

    count: int
    """Rows that are kept."""
    name: str = "keep_rows"

    def apply(self, gm: fx.GraphModule) -> int:
        """Raises NoRule where rows are not known to be independent."""
        batch = value_of(next(value for value in outputs_of(gm) if isinstance(value, fx.Node))).shape[0]
        infos = follow_batch(gm, batch)
        emitter = Emitter(gm)
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        rows = emitter.rows(self.count, value_of(next(iter(infos))).device)
        subset = Subset(emitter, infos, {BATCH: Rows(rows)}, _attend)
        nodes = list(gm.graph.nodes)
        with emitter.before(first):
            for node in nodes:
                if node.op == "placeholder" and infos.get(node) is not None:
                    subset.seed(node)
        done = 0
        for node in nodes:
            if node.op == "call_function" and node in infos:
                with emitter.before(node):
                    emit(subset, node)
                done += 1
        emitter.output.args = (tuple(subset.env[output] for output in outputs_of(gm)),)
        return done


def _attend(subset: Subset, node: fx.Node) -> fx.Node:
    """Attention of the kept rows: each attends within itself."""
    info = subset.infos[node]
    rows = info[0] if isinstance(info, tuple) else info
    assert rows is not None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: subset.operand(node, rows, source))
    return subset.emitter.call(node.target, *args, **kwargs)
