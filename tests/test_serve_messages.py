"""Requests and replies of the serving example: what is taken, what is refused and why, what comes back."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from .support.examples import package

messages, models = package("serve.messages"), package("serve.models")
TASK, SIDE = "reconstruction", 12
LIMITS = messages.Limits(
    given={"planning": 2, TASK: 6},
    side=SIDE,
    steps={"planning": (50,), TASK: None},
    usual={"planning": 50, TASK: 30},
    most_bytes=20_000,
)


def frames(count: int = 6, side: int = SIDE, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def body(**changes: Any) -> bytes:
    fields = {"task": TASK, "frames": [messages.png(frame) for frame in frames()], "seed": 7, **changes}
    return json.dumps({name: value for name, value in fields.items() if value != "absent"}).encode()


def test_a_request_is_what_was_sent() -> None:
    request = messages.parse(body(steps=5), "me", LIMITS)
    assert (request.id, request.task, request.seed, request.steps) == ("me", TASK, 7, 5)
    assert np.array_equal(request.frames, frames())
    assert messages.parse(body(), "me", LIMITS).steps == 30
    planning = messages.parse(body(task="planning", frames=[messages.png(f) for f in frames(2)]), "me", LIMITS)
    assert planning.steps == 50
    video = models.clip(planning.frames)
    assert video.shape == (1, 6, 3, SIDE, SIDE)
    assert torch.equal(video[0, [0, -1]], torch.from_numpy(frames(2)).permute(0, 3, 1, 2) / 255)
    assert not video[0, 1:-1].any()
    assert torch.equal(models.clip(request.frames)[0], torch.from_numpy(frames()).permute(0, 3, 1, 2) / 255)


def jpeg() -> str:
    file = io.BytesIO()
    Image.fromarray(frames()[0]).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


PNG = messages.png(frames()[0])


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"x" * 20_001, 413, "more than 20000 bytes: send PNG images of 12 x 12 pixels"),
        (b"{", 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not JSON"),
        (b"[" * 19_000, 400, "the body is not JSON"),
        (b"[]", 400, "the body is a JSON list: send an object with task, frames, seed, steps"),
        (body(guidance=3), 422, "'guidance' is no field of a request: the fields are task, frames, seed, steps"),
        (body(task="absent"), 422, "task=None is not served here: choose from 'planning', 'reconstruction'"),
        (body(task=["planning"]), 422, "task=['planning'] is not served here"),
        (body(seed="absent"), 422, "seed=None must be a whole number from 0 to"),
        (body(seed=True), 422, "seed=True must be"),
        (body(seed=2**63), 422, "must be a whole number from 0 to 9223372036854775807"),
        (body(steps=0), 422, "steps=0 must be a whole number from 1 to 200"),
        (body(steps=1e1), 422, "steps=10.0 must be"),
        (body(task="planning", steps=30, frames=[PNG] * 2), 422, "steps=30: the plan that planning follows"),
        (body(frames="absent"), 422, "reconstruction is given 6 frames, and here are NoneType: send a list of 6"),
        (body(frames=[PNG] * 5), 422, "reconstruction is given 6 frames, and here are 5 of them"),
        (body(frames=[*[PNG] * 5, 3]), 422, "frames[5] is no string"),
        (body(frames=["?", *[PNG] * 5]), 422, "frames[0] is not base64"),
        (body(frames=[PNG[:80], *[PNG] * 5]), 422, "frames[0] is no PNG file that can be read"),
        (body(frames=[jpeg(), *[PNG] * 5]), 422, "frames[0] is no PNG file"),
        (body(frames=[messages.png(frames(1, 16)[0])] * 6), 422, "frames[0] has 16 x 16 pixels: send base64 of a PNG"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_with_the_reason(sent: bytes, status: int, message: str) -> None:
    with pytest.raises(messages.Refused) as refused:
        messages.parse(sent, "me", LIMITS)
    assert refused.value.status == status
    assert message in str(refused.value)


def test_results_are_sent_bit_for_bit() -> None:
    arrays = {"rgb": np.array([[0.1, math.nan]], np.float32), "poses": np.eye(4, dtype=np.float32)}
    event = json.loads(messages.line("result", npz=messages.pack(arrays)))
    back = messages.unpack(event["npz"])
    assert event["event"] == "result"
    assert {name: (a.dtype, a.tobytes()) for name, a in back.items()} == {
        name: (a.dtype, a.tobytes()) for name, a in arrays.items()
    }
