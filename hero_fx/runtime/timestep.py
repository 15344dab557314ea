"""Reading the timestep of a call, with one read of the device a call or none."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from hero_fx.passes import compat

__all__ = ["AmbiguousCall", "Table", "Timestep", "TimestepReader"]


class AmbiguousCall(RuntimeError):
    """A call whose step, lane or request cannot be told; the message says why and what to do.

    With `strict=False` such a call is computed in full, by itself, and one warning says so.
    """


@dataclass(frozen=True, slots=True)
class Table:
    """Where a timestep lies in the table that its loop iterates over."""

    storage: compat.StorageId
    offset: int


@dataclass(frozen=True, slots=True)
class Timestep:
    """The diffusion time of a call, in the model's own units."""

    values: tuple[float, ...]
    """One value where all are equal, else those of one row (tokens or frames at times of their own), in order."""
    table: Table | None = None
    """The element of the scheduler's table that it is a view of, where it is one."""

    @property
    def total(self) -> float:
        """Sum of the values: its change gives the direction of travel."""
        return sum(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{low:g}" if low == high else f"{low:g}..{high:g}"


_MAX_TABLES = 4
_MAX_TABLE = 65536
"""Elements. A scheduler's table has some ten to a thousand; a larger storage is something else."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """Host copy of a device storage."""

    storage: torch.UntypedStorage
    """Held so that its address cannot be given to another storage while the copy is in use."""
    version: int
    values: list[float]


class TimestepReader:
    """Gets the values of a timestep tensor, with few reads of the device.

    A read makes the host wait for the device, once a step, in the loop that should run ahead of it. But
    pipelines iterate over their scheduler's table, so the timestep is a view of one element of it (or an
    expansion of that), and storage and offset say which. The whole table is then read once, and later steps
    read nothing. In-place writes are noticed by the version counter that all views share (not those through
    `.data`, which PyTorch hides from everyone).
    """

    def __init__(self, *, tables_on_cpu: bool = False) -> None:
        """`tables_on_cpu`: use tables for CPU tensors too, where reading costs nothing; made for tests."""
        self.reads = 0
        """Reads of tensor memory so far."""
        self._tables_on_cpu = tables_on_cpu
        self._tables: OrderedDict[tuple[torch.device, int, torch.dtype], _Copy] = OrderedDict()

    def read(self, t: torch.Tensor, batch: Collection[int] = ()) -> Timestep:
        """The timestep `t`, of any shape and any real dtype.

        `batch`: the sizes that the batch may have. Where the first axis of `t` has one of them, its rows belong to the
        elements of the batch.

        Raises:
            ValueError: a tensor that can be no timestep, or a value that is not finite.
            AmbiguousCall: the elements of the batch are at different timesteps, so that no one step is theirs.
        """
        if t.dtype is torch.bool or t.dtype.is_complex:
            raise ValueError(
                f"timestep has dtype {t.dtype}; allowed: a float or an int dtype. Name the input that holds "
                "the timestep with timestep=."
            )
        if t.numel() == 0:
            raise ValueError(
                f"timestep has shape {tuple(t.shape)}, so no value; allowed: at least one. Name the input "
                "that holds the timestep with timestep=."
            )
        if any(size > 1 and stride != 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
            self.reads += 1
            return Timestep(_one_row(t.detach().cpu(), batch))
        value = self._look_up(t)
        if value is None:
            self.reads += 1
            value = float(t[(0,) * t.dim()].item())
        _check_finite((value,))
        return Timestep((value,), _table(t))

    def _look_up(self, t: torch.Tensor) -> float | None:
        """The value of `t`, whose elements are all one, from the table it is a view of; None if it is not."""
        # An inference tensor has no version counter, so a write to it would go unnoticed.
        if (t.is_cpu and not self._tables_on_cpu) or t.is_inference():
            return None
        storage = t.untyped_storage()
        address = storage.data_ptr()
        count, rest = divmod(storage.nbytes(), t.dtype.itemsize)
        if address == 0 or rest != 0 or not 1 < count <= _MAX_TABLE:
            return None
        key, version = (t.device, address, t.dtype), t._version
        table = self._tables.get(key)
        # A storage that was resized in place is held, but has left its address to others.
        if (
            table is None
            or table.version != version
            or len(table.values) != count
            or table.storage.data_ptr() != address
        ):
            self.reads += 1
            table = _Copy(storage, version, t.detach().as_strided((count,), (1,), 0).tolist())
            self._tables[key] = table
            if len(self._tables) > _MAX_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return float(table.values[t.storage_offset()])


def _table(t: torch.Tensor) -> Table | None:
    """The place of one element in a storage of several."""
    count = t.untyped_storage().nbytes() // t.dtype.itemsize
    return Table(compat.StorageId(t), int(t.storage_offset())) if 1 < count <= _MAX_TABLE else None


def _one_row(t: torch.Tensor, batch: Collection[int]) -> tuple[float, ...]:
    """The values that all elements of the batch share."""
    values = t.double()
    _check_finite(values.flatten().tolist())
    if t.shape[0] > 1 and t.shape[0] in batch:
        rows = values.flatten(1) if t.dim() > 1 else values[:, None]
        if not bool((rows == rows[:1]).all()):
            shown = ", ".join(str(Timestep(tuple(row))) for row in rows[:4].tolist())
            raise AmbiguousCall(
                f"the {t.shape[0]} elements of the batch are at different timesteps ({shown}{', ...' * (len(rows) > 4)}), "
                "but a call is one step of one trajectory: call the model once for each request, each in its own "
                "hero_fx.session(...) or hero_fx.calling(session=...)"
            )
        values = rows[0]
    row = tuple(values.flatten().tolist())
    return row[:1] if len(set(row)) == 1 else row


def _check_finite(values: Sequence[float]) -> None:
    bad = next((value for value in values if not math.isfinite(value)), None)
    if bad is not None:
        raise ValueError(f"timestep={bad} is not finite, so its step cannot be told; check the scheduler.")
