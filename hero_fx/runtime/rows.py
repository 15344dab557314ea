"""The rows of a batch, as inputs of the graph of one request and of that of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hero_fx.program import Program

__all__ = ["Rows", "rows_of"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The inputs of a batch, as inputs of the graph of one request."""

    values: tuple[Any, ...]
    own: tuple[bool, ...]
    """Which of them have rows for each request, along a first axis."""
    strides: tuple[tuple[int, ...], ...]
    """Of the inputs of one request, as they were compiled for."""

    def of(self, request: int) -> list[Any]:
        """The inputs of one request."""
        return [value[request] if own else value for value, own in self._pairs]

    def alone(self, request: int) -> list[Any]:
        """The same, laid out as the graph of one request was compiled for.

        Raises:
            ValueError: it was compiled for one value, expanded, and the request has several.
        """
        pairs = zip(self.of(request), self.own, self.strides, strict=True)
        return [_laid_out(value, stride) if own else value for value, own, stride in pairs]

    def together(self, requests: Sequence[int]) -> list[Any]:
        """The inputs of several requests, those of their own along a new first axis."""
        if all(b == a + 1 for a, b in pairwise(requests)):  # neighbours need no copy
            return [value[requests[0] : requests[-1] + 1].contiguous() if own else value for value, own in self._pairs]
        return [torch.stack([value[i] for i in requests]) if own else value for value, own in self._pairs]

    @property
    def _pairs(self) -> Iterator[tuple[Any, bool]]:
        return zip(self.values, self.own, strict=True)


def _laid_out(value: Tensor, stride: Sequence[int]) -> Tensor:
    if all(size == 1 or a == b for size, a, b in zip(value.shape, value.stride(), stride, strict=True)):
        return value
    one = value[tuple(slice(1) if step == 0 else slice(None) for step in stride)]
    if not torch.equal(one.expand_as(value), value):
        raise ValueError(
            f"the model was called for one request with an input {tuple(value.shape)} that was one value, expanded, and "
            "the batch has several values for a request: call the model for one request with such an input too"
        )
    result = torch.empty_strided(one.shape, stride, dtype=value.dtype, device=value.device).copy_(one)
    return result.expand_as(value)


def rows_of(program: Program, tensors: Sequence[Tensor], own: Sequence[bool], requests: int) -> Rows:
    """The inputs of the graph of one request, which may have numbers among them that the batch's has not."""
    left = iter(zip(tensors, own, strict=True))
    values: list[Any] = []
    flags = []
    for value in program.inputs:
        if value.kind is None:
            values.append(value.value)
            flags.append(False)
            continue
        tensor, has_rows = next(left)
        values.append(tensor.unflatten(0, (requests, -1)) if has_rows else tensor)
        flags.append(has_rows)
    return Rows(tuple(values), tuple(flags), tuple(value.stride for value in program.inputs))
