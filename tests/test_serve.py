"""The serving example without Ray: trajectories that take turns, end early or fail; files; metrics."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch._dynamo.utils import counters

import hero_fx

from .support.examples import package, world
from .support.tiny import randomized
from .support.warm import packages_in_memory

engines, messages, metrics, models = (package(f"serve.{name}") for name in ("engine", "messages", "metrics", "models"))
TASK, SIDE = "reconstruction", 12


def frames(count: int = 6, side: int = SIDE, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


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


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


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
        with engine._turns:  # until all threads have begun
            replies = asyncio.gather(*map(watched, asked))
            await until(lambda: engine.stats()["requests"]["live"] == 3)
            await asyncio.sleep(0.1)
        return await replies

    before = engine.stats()["tasks"][TASK]
    replies = asyncio.run(together())
    for of, events in zip(asked, replies, strict=True):
        assert [(e["step"], e["steps"]) for e in events[:-1]] == [(i + 1, of.steps) for i in range(of.steps)]
        assert (events[-1]["event"], events[-1]["id"]) == ("result", of.id)
        assert_same(events, alone(served, of))
    assert Counter(order[:15]) == {0: 5, 1: 5, 2: 5}  # three live ones in turn; the others wait
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

    async def run() -> list[dict[str, Any]]:
        other = asyncio.create_task(reply(engine, request(0)))
        with pytest.raises(hero_fx.OverBudget, match="no room"):
            await reply(engine, fails)
        return await other

    assert_same(asyncio.run(run()), alone(served, request(0)))
    assert_nothing_is_left(engine, done=1, failed=1)


def test_more_live_requests_than_the_budget_has_room_for_are_no_server(served: Any) -> None:
    made, limits = served
    need = made[TASK].warm_up()
    assert need > 0

    backend = SimpleNamespace(config=SimpleNamespace(max_state_bytes=3 * need - 1), stats=made[TASK].backend.stats)
    bounded = {TASK: replace(made[TASK], backend=backend)}
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
    for name in (
        "full_steps",
        "cached_steps",
        "full_calls",
        "partial_calls",
        "cached_calls",
        "refused_calls",
        "evictions",
    ):
        assert samples[f"hero_fx_{name}_total", "first", TASK] == of[name]
    for name in ("sessions", "state_bytes", "graphs"):
        assert samples[f"hero_fx_{name}", "first", TASK] == of[name]
    assert samples["world_requests_total", "done", "first"] == 1
    assert samples["world_requests_total", "cancelled", "second"] == 2
    assert samples["world_live_requests", "second"] == 1
    assert samples["world_answers_total", "413"] == 1
