"""Requests and replies: JSON in, one JSON object a line out.

A request has these fields:

| field | what |
|---|---|
| `task` | `"planning"` or `"reconstruction"` |
| `frames` | the given frames as base64 of PNG files: first and last for planning, all for reconstruction |
| `seed` | of the noise, 0 to 2**63 - 1 |
| `steps` | of the trajectory; the task's usual number if not given |

A reply has the media type `application/x-ndjson`. Each line is an object with an `event`:

| `event` | further fields |
|---|---|
| `step` | `step`, from 1, and `steps` |
| `result` | `id`, and `npz`: base64 of a NumPy archive |
| `error` | `error`: what went wrong after the first step, and what to do |

The archive has float32 arrays: `rgb` [F, 3, S, S] in [0, 1], `depth` [F, S, S] in metres, `raymap` [F, 6, S / 2, S / 2],
`poses` [F, 4, 4] and `latents` [F, 22, S / 2, S / 2]; see `WorldModelOutput`.

What is refused before the first step has a status of its own and the body `{"error": "..."}`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = ["Limits", "Refused", "Request", "line", "pack", "parse", "png", "unpack"]

FIELDS = ("task", "frames", "seed", "steps")


class Refused(Exception):
    """A request that is not run; the message says why, and what to do."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(status, message, retry_after)  # all three, so that it can be pickled
        self.status, self.message, self.retry_after = status, message, retry_after

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a deployment takes."""

    given: Mapping[str, int]
    """Frames that each task is given; other tasks are not served."""
    side: int
    """Height and width of a frame, in pixels."""
    steps: Mapping[str, tuple[int, ...] | None]
    """Numbers of steps that each task's plan is for; None where any number will do."""
    usual: Mapping[str, int]
    """Steps where a request gives none."""
    most_steps: int = 200
    most_bytes: int = 2**20
    """Of the body of a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A request that was checked."""

    id: str
    """Names its session."""
    task: str
    frames: np.ndarray[Any, np.dtype[np.uint8]]
    """[given, side, side, 3] in 0 .. 255."""
    seed: int
    steps: int


def parse(body: bytes, id: str, limits: Limits) -> Request:
    """The request in a body; `id` names it.

    Raises:
        Refused: 413 for one that is too large, 400 for what is no JSON object, 422 for fields that do not fit.
    """
    if len(body) > limits.most_bytes:
        raise too_large(limits)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({error}): send an object with {', '.join(FIELDS)}") from None
    if not isinstance(fields, dict):
        raise Refused(400, f"the body is a JSON {type(fields).__name__}: send an object with {', '.join(FIELDS)}")
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise Refused(422, f"{unknown[0]!r} is no field of a request: the fields are {', '.join(FIELDS)}")
    task = fields.get("task")
    if not isinstance(task, str) or task not in limits.given:
        raise Refused(422, f"task={task!r} is not served here: choose from {', '.join(map(repr, limits.given))}")
    return Request(
        id=id,
        task=task,
        frames=_frames(fields.get("frames"), task, limits),
        seed=_whole(fields.get("seed"), "seed", 0, 2**63 - 1),
        steps=_steps(fields.get("steps"), task, limits),
    )


def too_large(limits: Limits) -> Refused:
    """What is answered to a body that is too large."""
    return Refused(
        413,
        f"the body has more than {limits.most_bytes} bytes: send PNG images of {limits.side} x {limits.side} pixels, which "
        "take some kilobytes each",
    )


def _whole(value: object, name: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(422, f"{name}={value!r} must be a whole number from {least} to {most}")
    return value


def _steps(value: object, task: str, limits: Limits) -> int:
    steps = limits.usual[task] if value is None else _whole(value, "steps", 1, limits.most_steps)
    planned = limits.steps[task]
    if planned is not None and steps not in planned:
        raise Refused(
            422,
            f"steps={steps}: the plan that {task} follows here is for {' or '.join(map(str, planned))} steps; ask for "
            "these, or leave steps out",
        )
    return steps


def _frames(value: object, task: str, limits: Limits) -> np.ndarray[Any, np.dtype[np.uint8]]:
    count = limits.given[task]
    if not isinstance(value, list) or len(value) != count:
        got = f"{len(value)} of them" if isinstance(value, list) else type(value).__name__
        raise Refused(422, f"frames: {task} is given {count} frames, and here are {got}: send a list of {count} images")
    return np.stack([_pixels(frame, f"frames[{i}]", limits.side) for i, frame in enumerate(value)])


def _pixels(frame: object, name: str, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    wanted = f"send base64 of a PNG file of {side} x {side} pixels"
    if not isinstance(frame, str):
        raise Refused(422, f"{name} is no string: {wanted}")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(frame, validate=True)), formats=["PNG"])
        if image.size != (side, side):  # told by the header: nothing is unpacked yet
            raise Refused(422, f"{name} has {image.width} x {image.height} pixels: {wanted}")
        return np.asarray(image.convert("RGB"))
    except binascii.Error as error:
        raise Refused(422, f"{name} is not base64 ({error}): {wanted}") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        raise Refused(422, f"{name} is no PNG file that can be read: {wanted}") from None


def png(frame: np.ndarray[Any, Any]) -> str:
    """A frame [side, side, 3] of 0 .. 255 as a request has it."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pack(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Arrays as a result has them."""
    file = io.BytesIO()
    np.savez(file, **dict(arrays))
    return base64.b64encode(file.getvalue()).decode()


def unpack(text: str) -> dict[str, np.ndarray[Any, Any]]:
    """The inverse of `pack`."""
    with np.load(io.BytesIO(base64.b64decode(text))) as archive:
        return dict(archive)


def line(event: str, **fields: Any) -> str:
    """One line of a reply."""
    return json.dumps({"event": event, **fields}) + "\n"
