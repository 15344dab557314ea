"""A graph that Dynamo traced, for one backend or several: it is normalised once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import fx

from hero_fx.passes import compat
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.normalize.subclasses import Unwrapped, unwrap
from hero_fx.passes.pipeline import PassError, PassRecord

from .build import find_structure, normalized
from .checks import UnsupportedModel

__all__ = ["Source"]

Normal = tuple[fx.GraphModule, tuple[PassRecord, ...], Structure]


class Source:
    """Dynamo's graph and its example inputs. Backends copy the normalised graph, and leave it as it is."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.gm, self.inputs = gm, inputs
        self._normal: dict[tuple[str, ...], Normal] = {}

    @cached_property
    def plain(self) -> Unwrapped:
        """The graph with plain tensors as its inputs."""
        return unwrap(self.gm, self.inputs)

    def normal(self, disabled: Sequence[str]) -> Normal:
        """The normalised graph without the passes that are turned off, their records, and its branches.

        Raises:
            UnsupportedModel: the graph goes by the values of tensors.
        """
        key = tuple(sorted(disabled))
        if key not in self._normal:
            self._normal[key] = self._normalize(disabled)
        return self._normal[key]

    def _normalize(self, disabled: Sequence[str]) -> Normal:
        try:
            normal, records = normalized(self.plain.gm, self.plain.inputs, disabled)
            return normal, records, find_structure(normal)
        except (PassError, *compat.DATA_DEPENDENT) as error:
            cause = error.__cause__ if isinstance(error, PassError) else error
            if not isinstance(cause, compat.DATA_DEPENDENT):
                raise
            raise UnsupportedModel(
                "the graph goes by values that only running it tells: by a Python number that changes from call to call, "
                f"or by .item() or nonzero(); pass such numbers as tensors ({str(cause).strip().splitlines()[0]})"
            ) from error
