"""The timestep guard: from the timestep of a call to what kind of step the call is.

A compiled model sees one call after another and nothing of the loop around it. The step has to be read off
the calls, and counting them is not enough: pipelines call once or several times a step, stop early, start
over, and serve several trajectories in a row. What does tell is the timestep:

    timestep   999 999 979 979 959 959 ... 999        same again = the next lane of the same step
    step         0   0   1   1   2   2       0        further along = the next step
    lane         0   1   0   1   0   1       0        back against the direction of travel = a new trajectory

All of this is host arithmetic on two numbers. `TimestepReader` gets the numbers, with one read of the device
a call or none.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch

from hero_fx.schedule import Schedule

__all__ = ["Call", "TimestepGuard", "TimestepReader"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the model, placed in its trajectory."""

    step: int
    """Index of the step in the trajectory."""
    lane: int | str
    """Which of the calls of a step: counted from 0, or the name of a named lane."""
    full: bool
    """Whether this call must compute every layer."""
    since_full: int
    """x of Eq. 6: steps since this lane's last full step; 0 where `full`."""
    gap: int
    """d of Eq. 6: distance between the lane's last two full steps, this one included; 0 if there is one."""
    fulls: int
    """Full steps of this lane before this call, in this trajectory."""
    new_trajectory: bool
    """This call starts a trajectory: whatever state there is belongs to another one."""
    trajectory: int
    """Number of the trajectory, from 1; a reset does not start the count anew."""


@dataclass(slots=True)
class _Lane:
    """What has to be known of a lane's past in this trajectory."""

    called: int
    """Step of its last call."""
    full_at: int
    """Its last full step."""
    gap: int
    fulls: int


class TimestepGuard:
    """Follows the calls of one session through their trajectories.

    Not thread-safe: calls of one session are ordered anyway, and their owner holds a lock. A call that raises
    leaves the guard as it was.
    """

    def __init__(self, schedule: Schedule, *, max_lanes: int = 8) -> None:
        """`schedule` says which steps are full; more than `max_lanes` lanes are taken for a mistake."""
        if max_lanes < 1:
            raise ValueError(f"max_lanes={max_lanes} is not allowed; it must be at least 1 (default: 8).")
        self._schedule = schedule
        self._max_lanes = max_lanes
        self._trajectory = 0
        self.reset()

    def reset(self) -> None:
        """Forgets the trajectory: the next call starts a new one."""
        self._step: int | None = None
        self._timestep = (0.0, 0.0)
        self._direction = 0
        self._anonymous = 0
        self._lanes: dict[int | str, _Lane] = {}

    def advance(self, timestep: tuple[float, float], *, name: str | None = None, step_index: int | None = None) -> Call:
        """Places the next call.

        `timestep`: lowest and highest value of the timestep input, in the model's own units. Two calls are of
        the same step only if both agree: the timesteps of conditioning tokens may stand still while the
        others move. Exact comparison is right, because the loop hands all calls of a step the same tensor.
        The direction of travel is the sign of the first change of a trajectory.

        `name`, `step_index`: what diffusers' `cache_context(name, step_index=...)` says, if it is used. A
        name that comes again at the same timestep starts a new step (Heun's method evaluates a timestep
        twice). A step index wins over the timestep: a lower one starts a trajectory, and so does the same one
        with a name that was seen in this step. It may skip steps, and a trajectory may start with any.

        A lane without a full step in this trajectory gets one, and so does a lane that was not called at a
        step that the schedule makes full. After the last step of a schedule of known length, another timestep
        (or a name that comes again) starts a trajectory, whatever the direction.

        Raises ValueError for a timestep that is not finite, a negative step index, or a step that the
        schedule does not have; RuntimeError for more lanes than `max_lanes`.
        """
        if not (math.isfinite(timestep[0]) and math.isfinite(timestep[1])):
            raise ValueError(f"timestep={timestep} is not finite, so its step cannot be told; check the scheduler.")
        if step_index is not None and step_index < 0:
            raise ValueError(f"step_index={step_index} is negative; steps are counted from 0.")
        starts, step, direction = self._locate(timestep, name, step_index)
        lanes = {} if starts else self._lanes
        anonymous = 0 if starts or step != self._step else self._anonymous
        lane = anonymous if name is None else name
        scheduled = self._schedule.is_full(step)
        past = lanes.get(lane)
        if past is None:
            if len(lanes) >= self._max_lanes:
                raise RuntimeError(self._too_many_lanes(timestep, name))
            full, fulls, since, gap = True, 0, 0, 0
            lanes[lane] = _Lane(step, step, gap, 1)
        else:
            # Between two calls a lane can miss steps, full ones among them; its features are then too old.
            full = scheduled or any(map(self._schedule.is_full, range(past.called + 1, step)))
            fulls, since, gap = past.fulls, step - past.full_at, past.gap
            past.called = step
            if full:
                past.full_at, past.gap, past.fulls = step, since, fulls + 1
                since, gap = 0, since
        self._trajectory += int(starts)
        self._step, self._timestep, self._direction = step, timestep, direction
        self._lanes, self._anonymous = lanes, anonymous + (name is None)
        return Call(step, lane, full, since, gap, fulls, starts, self._trajectory)

    def _locate(self, timestep: tuple[float, float], name: str | None, step_index: int | None) -> tuple[bool, int, int]:
        """(starts a trajectory, its step, direction of travel: -1, 1, or 0 if not known yet)."""
        step = self._step
        start = True, step_index or 0, 0
        if step is None:
            return start
        before = None if name is None else self._lanes.get(name)
        seen = before is not None and before.called == step
        if step_index is not None:
            if step_index < step or (step_index == step and seen):
                return start
            return False, step_index, self._direction
        total = self._schedule.num_steps
        over = total is not None and step + 1 >= total
        if timestep == self._timestep:
            if not seen:
                return False, step, self._direction
            return start if over else (False, step + 1, self._direction)
        (low, high), (low_before, high_before) = timestep, self._timestep
        change = (low - low_before) + (high - high_before)
        direction = (change > 0) - (change < 0)
        if over or direction * self._direction < 0:
            return start
        return False, step + 1, self._direction or direction

    def _too_many_lanes(self, timestep: tuple[float, float], name: str | None) -> str:
        if name is not None:
            return (
                f"name={name!r} would be lane {self._max_lanes + 1} of one trajectory, and at most "
                f"{self._max_lanes} are allowed. Give cache_context the same few names at every step (such "
                "as 'cond' and 'uncond'), and call hero_fx.reset() where a new trajectory starts."
            )
        return (
            f"{self._max_lanes + 1} calls in a row with timestep={timestep}; at most {self._max_lanes} are "
            "allowed. A denoising loop changes the timestep from step to step, and that is how steps are "
            "told apart. If these calls start new trajectories, call hero_fx.reset() before each; if they "
            "are of different requests, wrap each in hero_fx.session(...); if they are steps of one loop, "
            "name them with the model's cache_context(name, step_index=...)."
        )


_MAX_TABLES = 4
_MAX_TABLE = 65536
"""Elements. A scheduler's table has some ten to a thousand; a larger storage is something else."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Host copy of a device storage."""

    storage: torch.UntypedStorage
    """Held so that its address cannot be given to another storage while the copy is in use."""
    version: int
    values: list[float]


class TimestepReader:
    """Gets the lowest and the highest value of a timestep tensor, with few reads of the device.

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
        self._tables: OrderedDict[tuple[torch.device, int, torch.dtype], _Table] = OrderedDict()

    def read(self, t: torch.Tensor) -> tuple[float, float]:
        """(lowest, highest) value of `t`, of any shape and any real dtype; ValueError for other tensors."""
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
            low, high = torch.stack(torch.aminmax(t.detach())).tolist()
            return float(low), float(high)
        value = self._look_up(t)
        if value is None:
            self.reads += 1
            value = float(t[(0,) * t.dim()].item())
        return value, value

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
            table = _Table(storage, version, t.detach().as_strided((count,), (1,), 0).tolist())
            self._tables[key] = table
            if len(self._tables) > _MAX_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return float(table.values[t.storage_offset()])
