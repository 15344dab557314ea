"""The serving example without Ray: requests, trajectories that take turns, metrics, and the loader's arithmetic."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch._dynamo.utils import counters

import hero_fx

from .support.examples import package, world
from .support.tiny import randomized
from .support.warm import packages_in_memory

arrivals, engines, messages, metrics, models = (
    package(f"serve.{name}") for name in ("arrivals", "engine", "messages", "metrics", "models")
)
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


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of 2 layers on 6 x 3 x 3 tokens."""
    torch.manual_seed(0)
    transformer = randomized(world("model").world_transformer(2, 1))
    transformer.register_to_config(sample_height=SIDE // 2, sample_width=SIDE // 2)
    folder = tmp_path_factory.mktemp("serve") / "weights"
    world("pipeline").WorldModelPipeline(transformer, world("model").world_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(weights: Path) -> Any:
    """The model that all tests share, compiled once; and what it takes."""
    torch._dynamo.reset()
    made, limits = models.make(models.Settings(system="hero", tasks=(TASK,), weights=weights, inner="eager"))
    made[TASK].warm_up()
    return made, limits


@pytest.fixture
def engine(served: Any) -> Any:
    return engines.Engine(*served, live=3)


def request(seed: int, steps: int = 7) -> Any:
    return messages.Request(id=f"request {seed}", task=TASK, frames=frames(seed=seed), seed=seed, steps=steps)


async def reply(engine: Any, asked: Any) -> list[dict[str, Any]]:
    return [json.loads(line) async for line in engine.denoise(asked)]


def alone(served: Any, asked: Any) -> dict[str, Any]:
    """What a request gives without an engine."""
    model = served[0][TASK]
    arrays: dict[str, Any] = model.run(replace(asked, id="alone"), lambda step: None)
    model.drop(replace(asked, id="alone"))
    return arrays


def assert_same(events: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    arrays = messages.unpack(events[-1]["npz"])
    assert arrays.keys() == expected.keys() == {"rgb", "depth", "raymap", "poses", "latents"}
    for name, array in arrays.items():
        assert array.tobytes() == expected[name].tobytes(), name


def assert_nothing_is_left(engine: Any, **requests: int) -> None:
    stats = engine.stats()
    assert stats["requests"] == {"done": 0, "cancelled": 0, "failed": 0, "live": 0, **requests}
    assert (stats["tasks"][TASK]["sessions"], stats["tasks"][TASK]["state_bytes"]) == (0, 0)


def test_requests_take_turns_and_are_what_they_are_alone(served: Any, engine: Any) -> None:
    asked, order = [request(seed, steps=6 + seed) for seed in range(5)], []

    async def watched(of: Any) -> list[dict[str, Any]]:
        events = []
        async for line in engine.denoise(of):
            order.append(of.seed)
            events.append(json.loads(line))
        return events

    async def together() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*map(watched, asked))

    before = engine.stats()["tasks"][TASK]
    replies = asyncio.run(together())
    for of, events in zip(asked, replies, strict=True):
        assert [(e["step"], e["steps"]) for e in events[:-1]] == [(i + 1, of.steps) for i in range(of.steps)]
        assert (events[-1]["event"], events[-1]["id"]) == ("result", of.id)
        assert_same(events, alone(served, of))
    assert Counter(order[:12]).keys() == {0, 1, 2}  # three live ones in turn; the others wait
    assert all(order[i] != order[i + 1] for i in range(3, 9))
    assert_nothing_is_left(engine, done=5)
    now = engine.stats()["tasks"][TASK]
    assert now["cached_steps"] > before["cached_steps"]
    assert now["evictions"] == now["refused_calls"] == 0


def test_full_steps_are_the_pipelines_own(weights: Path, served: Any) -> None:
    pipe = world("pipeline").WorldModelPipeline.from_pretrained(weights)
    asked = request(1, steps=4)  # three full steps to begin with, and a full one at the end
    out = pipe(models.clip(asked.frames), TASK, 4, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(alone(served, asked)["rgb"], out.rgb[0].numpy(), atol=1e-5)


async def leave_after(lines: AsyncIterator[str], count: int) -> None:
    for _ in range(count):
        await anext(lines)
    await lines.aclose()  # type: ignore[attr-defined]


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_who_goes_away_frees_the_session_and_disturbs_nobody(served: Any, engine: Any) -> None:
    async def run() -> list[dict[str, Any]]:
        stays = asyncio.create_task(reply(engine, request(0, steps=9)))
        cancelled = asyncio.create_task(reply(engine, request(2, steps=199)))
        await leave_after(engine.denoise(request(1, steps=199)), 5)
        cancelled.cancel()
        await until(lambda: engine.stats()["requests"]["cancelled"] == 2)
        return await stays

    assert_same(asyncio.run(run()), alone(served, request(0, steps=9)))
    assert_nothing_is_left(engine, done=1, cancelled=2)


def test_who_goes_away_before_the_turn_comes_never_runs(served: Any) -> None:
    engine = engines.Engine(*served, live=1)
    steps = engine.stats()["tasks"][TASK]["full_steps"]

    async def run() -> None:
        runs = asyncio.create_task(reply(engine, request(0, steps=4)))
        await asyncio.sleep(0)
        waits = asyncio.create_task(reply(engine, request(1)))
        await asyncio.sleep(0)
        waits.cancel()
        await runs

    asyncio.run(run())
    assert_nothing_is_left(engine, done=1, cancelled=1)
    assert engine.stats()["tasks"][TASK]["full_steps"] == steps + 4


def test_a_failure_is_the_requests_own(served: Any, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, fails = models.Told.forward, request(1)

    def failing(told: Any, **inputs: Any) -> Any:
        if told.request is fails and told.step == 5:
            raise hero_fx.OverBudget("no room")
        return forward(told, **inputs)

    monkeypatch.setattr(models.Told, "forward", failing)

    async def run() -> list[Any]:
        return await asyncio.gather(*(reply(engine, of) for of in (fails, request(0))), return_exceptions=True)

    error, events = asyncio.run(run())
    assert isinstance(error, hero_fx.OverBudget)
    assert_same(events, alone(served, request(0)))
    assert_nothing_is_left(engine, done=1, failed=1)


def test_more_live_requests_than_the_budget_has_room_for_are_no_server(served: Any) -> None:
    made, limits = served
    need = made[TASK].warm_up()
    assert need > 0

    class Bounded(models.Model):  # type: ignore[misc]
        max_state_bytes = 3 * need - 1

    bounded = {TASK: Bounded(**{name: getattr(made[TASK], name) for name in made[TASK].__slots__})}
    with pytest.raises(ValueError, match=f"need 3 x {need} bytes .* lower live to 2, or raise max_state_bytes"):
        engines.Engine(bounded, limits, live=3)
    assert engines.Engine(bounded, limits, live=2).live == 2


def test_a_server_that_loads_files_compiles_nothing(weights: Path, served: Any, tmp_path: Path) -> None:
    with packages_in_memory():
        hero_fx.save(served[0][TASK].transformer, models.file_of(tmp_path, TASK))
        counters.clear()
        loaded = models.make(models.Settings(tasks=(TASK,), weights=weights, artifacts=tmp_path))
        engine = engines.Engine(*loaded, live=2)
        assert_same(asyncio.run(reply(engine, request(3))), alone(served, request(3)))
    assert not counters["frames"]
    assert_nothing_is_left(engine, done=1)


def test_a_plan_tells_for_which_steps_it_is(weights: Path) -> None:
    made, limits = models.make(models.Settings(system="plan", weights=weights))
    assert limits.steps == {"planning": (50,), TASK: (30,)}
    assert limits.given == {"planning": 2, TASK: 6}
    assert limits.side == SIDE
    _, limits = models.make(models.Settings(system="plain", tasks=("planning",), weights=weights))
    assert limits.steps == {"planning": None}
    assert all(model.max_state_bytes is None for model in made.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": "fast"}, "system='fast' must be one of 'plan', 'hero', 'plain'"),
        ({"tasks": ("sorting",)}, "must be some of 'planning', 'reconstruction'"),
        ({"live": 0}, "live=0 must be at least 1"),
        ({"system": "plain", "artifacts": Path("x")}, "leave artifacts out"),
    ],
)
def test_settings_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.Settings(**options)


def test_metrics_are_what_prometheus_reads(engine: Any) -> None:
    asyncio.run(reply(engine, request(0)))
    stats = {"replica": "first", **engine.stats()}
    other = {"replica": "second", "tasks": {}, "requests": {"done": 0, "cancelled": 2, "failed": 0, "live": 1}}
    text = metrics.text([stats, other], {200: 3, 413: 1}).decode()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    of = stats["tasks"][TASK]
    for name in ("full_steps", "cached_steps", "full_calls", "cached_calls", "refused_calls", "evictions"):
        assert samples[f"hero_fx_{name}_total", "first", TASK] == of[name]
    for name in ("sessions", "state_bytes", "graphs"):
        assert samples[f"hero_fx_{name}", "first", TASK] == of[name]
    assert samples["world_requests_total", "done", "first"] == 1
    assert samples["world_requests_total", "cancelled", "second"] == 2
    assert samples["world_live_requests", "second"] == 1
    assert samples["world_answers_total", "413"] == 1


def test_arrivals_are_poisson() -> None:
    times = arrivals.arrivals(rate=30, count=4000, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(2, rel=0.05)
    assert gaps.std() == pytest.approx(2, rel=0.05)
    np.testing.assert_allclose(arrivals.arrivals(rate=60, count=9, seed=1), np.array(times[:9]) / 2)
    assert arrivals.arrivals(30, 9, seed=2)[1] != times[1]


def test_the_loader_waits_for_nobody() -> None:
    running, most = 0, 0

    async def send(i: int) -> str:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.05)
        running -= 1
        return "same"

    outcomes = asyncio.run(arrivals.open_loop([0, 0.01, 0.02], send))
    assert most == 3
    assert [of.begun for of in outcomes] == [0, 0.01, 0.02]
    assert all(0.05 <= of.seconds < 1 for of in outcomes)


def test_a_run_is_summed_up() -> None:
    outcomes = [arrivals.Outcome(begun=float(i), seconds=1.0 + i, status="same") for i in range(21)]
    measured = arrivals.summary(outcomes)
    assert (measured.requests, measured.p50, measured.p95) == (21, 11.0, 20.0)
    assert measured.per_minute == pytest.approx(60 * 21 / 41)
    assert measured.held(20.0)
    assert not measured.held(19.9)
    refused = arrivals.summary([*outcomes, arrivals.Outcome(0.0, 0.1, "503: busy")])
    assert (refused.requests, refused.p95) == (22, 20.0)
    assert not refused.held(60.0)
    assert arrivals.summary(outcomes[:1]).p95 == 1.0
    assert arrivals.summary([arrivals.Outcome(0.0, 0.1, "503: busy")]).p50 == math.inf
