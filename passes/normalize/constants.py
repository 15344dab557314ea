"""Constants of the model's code: back to the literals that they were before tracing made attributes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hero_fx.passes.compat import FakeTensor, real_values

__all__ = ["WriteLiterals"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteLiterals:
    """Writes constants as calls of `torch.tensor`, as Dynamo has them, in place of attributes of the graph's module.

    Before (`mask[:, 0] = True`, `x * torch.tensor([1.0, 2.0])`)::

        _tensor_constant0 = self._tensor_constant0
        lift_fresh_copy = aten.lift_fresh_copy.default(_tensor_constant0)

    After::

        tensor = torch.tensor(True, dtype=torch.bool, device=device(type="cpu"))

    Legal because `lift_fresh_copy` is what tracing makes of `torch.tensor`: nothing else reads or writes the attribute,
    and both give fresh memory at every call. The literal is made once here and compared with the attribute byte by byte.

    AOTAutograd takes attributes for weights and makes graph inputs of them. As literals, constants are what plain
    compilation makes of them: Inductor writes small ones into its kernels, and a constant on the CPU does not keep a
    model on another device from CUDA graphs.
    """

    name: str = "write_literals"

    def apply(self, gm: fx.GraphModule) -> int:
        return sum(_write_literals(part) for part in gm.modules() if isinstance(part, fx.GraphModule))


def _write_literals(gm: fx.GraphModule) -> int:
    sites = 0
    for node in gm.graph.find_nodes(op="get_attr"):
        constant: Any = getattr(gm, node.target, None)
        arguments = _literal(constant)
        if arguments is None or any(user.target is not aten.lift_fresh_copy.default for user in node.users):
            continue
        value, kwargs = arguments
        for user in list(node.users):
            with gm.graph.inserting_before(user):
                literal = gm.graph.call_function(torch.tensor, (value,), kwargs)
            literal.meta = dict(user.meta)
            user.replace_all_uses_with(literal)
            gm.graph.erase_node(user)
            sites += 1
        gm.graph.erase_node(node)
    if sites:
        _drop_unread_attributes(gm)
    return sites


def _literal(constant: object) -> tuple[Any, dict[str, Any]] | None:
    """The arguments of `torch.tensor` that make `constant`; None where they do not make the very same bytes."""
    if type(constant) is not torch.Tensor or isinstance(constant, FakeTensor) or constant.layout is not torch.strided:
        return None
    kwargs: dict[str, Any] = {"dtype": constant.dtype, "device": constant.device}
    with real_values():
        value = constant.tolist()
        made = torch.tensor(value, **kwargs)
        if made.shape != constant.shape or made.stride() != constant.stride():
            return None
        return (value, kwargs) if torch.equal(_bytes(made), _bytes(constant)) else None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _drop_unread_attributes(gm: fx.GraphModule) -> None:
    read = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    for name, _ in list(gm.named_buffers(recurse=False)):
        if name not in read:
            delattr(gm, name)
