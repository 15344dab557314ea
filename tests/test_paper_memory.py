"""`examples/paper_memory.py`: the peak of a graph is that of running it op by op, and the table adds up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import hero_fx

from .support import tiny
from .support.examples import example
from .support.tracing import trace

memory = example("paper_memory")


class Watched(fx.Interpreter):
    """Runs a graph and watches how many bytes the values that it made take; those that are not needed again are freed."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.peak, self.given = 0, set[int]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("placeholder", "get_attr"):
            self.given |= storages(result).keys()
            return result
        made = storages([*self.env.values(), result])
        self.peak = max(self.peak, sum(size for at, size in made.items() if at not in self.given))
        return result


def storages(values: Any) -> dict[int, int]:
    """Bytes, by address."""
    found = [x.untyped_storage() for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def test_the_peak_is_that_of_running_the_graph() -> None:
    traced = tiny.captured(layers=2)
    hero = hero_fx.backend().trace(traced.gm, traced.inputs)
    taylorseer = hero_fx.backend("taylorseer").rewrite(hero)
    for gm in (hero.normal, hero.full, *hero.cached, taylorseer.full, *taylorseer.cached):
        watched = Watched(gm)
        values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            watched.run(*(torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x for x in values))
        assert memory.peak_bytes(gm) == watched.peak


def test_views_and_freed_values_take_nothing() -> None:
    def function(x: Tensor) -> Tensor:
        a = x + 1  # 24 bytes
        b = a.view(6) * 2  # with a's: 48
        return b.view(2, 3)[0] - 1  # b's and 12

    assert memory.peak_bytes(trace(function, torch.ones(2, 3))) == 48


def test_the_table_says_what_fits() -> None:
    small = {"state": 4e9, "full step": 3e9, "cached step": 5e9}
    lines = memory.table({"lean": small, "huge": {**small, "state": 70e9}}, 11e9).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells[0] == ["lean", "11.00", "4.00", "3.00", "5.00", "20.00", "fits"]
    assert cells[1][-2:] == ["86.00", "does not fit"]
