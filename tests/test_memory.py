"""`hero_fx.passes.analysis.memory`: which values share memory, and what writes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.emit import by_name
from hero_fx.passes.ops import is_functional, writes

from .support.tracing import capture, normal_form, trace

X = torch.ones(2, 3, 4)
VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda x: x[:, 1:],
    "diagonal": lambda x: x.diagonal(dim1=0, dim2=1),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "view as another dtype": lambda x: x.view(torch.int32),
    "a part of a split": lambda x: x.chunk(2, -1)[1],
    "reshape that need not copy": lambda x: x.reshape(6, 4),
    "flip of axes": lambda x: x.permute(2, 0, 1).flatten(1),
    "dropout that drops nothing": lambda x: torch.dropout(x, 0.3, train=False),
    "cast to the same dtype": lambda x: x.to(torch.float32),
    "cast to another's": lambda x: x.type_as(X),
    "mesh": lambda x: torch.meshgrid(x[0, 0], x[0, :, 0], indexing="ij")[0],
    "einsum that moves axes": lambda x: torch.einsum("abc->cba", x),
    "what a write returns": lambda x: x[0].mul_(2),
}
COPIES: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + 0,
    "cast": lambda x: x.to(torch.float64),
    "clone": lambda x: x.clone(),
    "index": lambda x: x[torch.tensor([0])],
    "cat": lambda x: torch.cat([x]),
    "product": lambda x: torch.einsum("abc,dec->abde", x, x),
}


def sides(function: Callable[[Tensor], Any]) -> tuple[Memory, Any, Any]:
    """The memory of a graph, its input, and its result."""
    graph = trace(lambda x: function(x), X).graph
    (result,) = graph.output_node().all_input_nodes
    return Memory(graph), graph.find_nodes(op="placeholder")[0], result


@pytest.mark.parametrize("name", VIEWS)
def test_views_share_memory(name: str) -> None:
    memory, x, result = sides(VIEWS[name])
    assert result in memory.shown(x)
    assert memory.returned(x)


@pytest.mark.parametrize("name", COPIES)
def test_copies_do_not(name: str) -> None:
    memory, x, result = sides(COPIES[name])
    assert result not in memory.shown(x)
    assert not memory.returned(x)


def test_a_view_is_one_also_where_its_fake_value_has_grown_stale() -> None:
    graph = trace(lambda x, y: (x + 1)[0] * y, X, X[0]).graph
    x, y, add, select, mul = list(graph.nodes)[:5]
    add.replace_all_uses_with(x)
    assert select in Memory(graph).shown(x)
    assert mul not in Memory(graph).shown(y)


def test_where_it_is_written() -> None:
    def function(x: Tensor) -> Tensor:
        a = x.sin()
        x[0].zero_()
        b = x.cos()
        return a + b + x.view(-1)[0]

    nodes = by_name(trace(function, X))
    memory = Memory(next(iter(nodes.values())).graph)
    x, a, write, b = (nodes[name] for name in ("x_1", "sin", "zero_", "cos"))
    assert writes(write) == [nodes["select"]]
    assert (memory.version(x, a), memory.version(x, b)) == (0, 1)
    assert memory.written(x)
    assert memory.written(x, a, b)
    assert not memory.written(x, write, None)
    assert not memory.written(x, None, a)
    assert not memory.written(a)


def test_what_is_functional() -> None:
    def function(x: Tensor) -> Any:
        y = torch.rand_like(x) + x.chunk(2)[0]
        torch.cos(y, out=torch.empty_like(y))
        return y.mul_(2)

    graph = trace(function, X).graph
    found = {node.name: is_functional(node) for node in graph.nodes}
    assert not any(found[name] for name in ("rand_like", "cos", "mul_", "output"))
    assert all(found[name] for name in ("add", "getitem", "empty_like"))


def test_a_call_that_is_no_operator_is_a_region_and_writes_to_what_it_is_given() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ x.mT
        return y

    graph = trace(function, X).graph
    memory = Memory(graph)
    (product,) = graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    regions = [memory.regions(node) for node in (graph.find_nodes(op="placeholder")[0], product, graph.output_node())]
    assert regions == [0, 1, 2]


class Overlapping(torch.nn.Module):
    """Two buffers in one memory."""

    whole: Tensor
    part: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.arange(12.0).reshape(3, 4))
        self.register_buffer("part", self.whole[1])

    def forward(self, x: Tensor) -> Tensor:
        before = x + self.part
        self.whole.mul_(2)
        return before + self.part


def test_inputs_that_share_memory_are_known_to() -> None:
    torch._dynamo.reset()
    graph = normal_form(Overlapping().eval(), X).graph
    whole, part = (n for n in graph.find_nodes(op="placeholder") if n.meta["val"].dim() < 3)
    assert part in Memory(graph).shown(whole)
    assert part.meta["val"].storage_offset() + whole.meta["val"].storage_offset() == 4
    assert len(capture(Overlapping().eval(), X)[1]) == 3
