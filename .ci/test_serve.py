"""The serving example with Ray: a real server of a tiny random model, its answers, and its faults. Run by `.ci/serve`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

import hero_fx
from serve.answers import refused_for
from serve.load import ask, measure, same
from serve.messages import png
from tests.support.tiny import randomized
from world.model import world_scheduler, world_transformer
from world.pipeline import WorldModelPipeline

ROOT = Path(__file__).parents[1]
SIDE, TASK, LIVE, QUEUED, REPLICAS = 12, "reconstruction", 2, 4, 2
LONG = 200


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas of a model of 2 layers; its address."""
    folder = tmp_path_factory.mktemp("server")
    torch.manual_seed(0)
    transformer = randomized(world_transformer(2, 1))
    transformer.register_to_config(sample_height=SIDE // 2, sample_width=SIDE // 2)
    WorldModelPipeline(transformer, world_scheduler()).save_pretrained(folder / "weights")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--system", "hero", "--inner", "eager", "--tasks", TASK, "--weights", str(folder / "weights")]
    options += ["--replicas", str(REPLICAS), "--threads", "1", "--live", str(LIVE), "--queued", str(QUEUED)]
    log = folder / "log"
    with log.open("w") as file:
        command = [sys.executable, str(ROOT / "examples/serve/app.py"), *options, "--port", str(port)]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + 300
        while "serving at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()


def body(seed: int, steps: int = 8) -> dict[str, Any]:
    frames = np.random.default_rng(seed).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
    return {"task": TASK, "frames": [png(frame) for frame in frames], "seed": seed, "steps": steps}


@asynccontextmanager
async def client_of(server: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server, timeout=60) as client:
        yield client


async def totals(client: httpx.AsyncClient) -> dict[str, int]:
    """Counts over all replicas."""
    replicas = (await client.get("/stats")).json()["replicas"]
    found = {name: sum(of["requests"][name] for of in replicas) for name in ("done", "cancelled", "failed", "live")}
    for name in ("sessions", "state_bytes", "evictions", "refused_calls", "cached_steps"):
        found[name] = sum(of["tasks"][TASK][name] for of in replicas)
    return found | {"replicas": len(replicas)}


async def until(client: httpx.AsyncClient, condition: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    deadline = time.monotonic() + 120
    while not condition(found := await totals(client)):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.1)
    return found


def nothing_is_left(found: dict[str, int]) -> bool:
    return found["live"] == found["sessions"] == found["state_bytes"] == 0 and found["replicas"] == REPLICAS


def with_client(server: str, test: Callable[[httpx.AsyncClient], Any]) -> None:
    """Runs a test, and looks afterwards whether anything is left."""

    async def run() -> None:
        async with client_of(server) as client:
            await test(client)
            found = await until(client, nothing_is_left)
            assert found["failed"] == found["evictions"] == found["refused_calls"] == 0

    asyncio.run(run())


def test_each_result_is_that_of_the_request_alone(server: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        bodies = [body(seed, steps=6 + seed) for seed in range(3)]
        alone = [await ask(client, of) for of in bodies]
        assert not same(alone[0], alone[1])
        before = await totals(client)
        times = [0.05 * i for i in range(6)]
        measured = await measure(client, bodies, alone, times)
        assert measured.statuses == {"same": 6}
        after = await totals(client)
        assert after["done"] == before["done"] + 6
        assert after["cached_steps"] > before["cached_steps"]

    with_client(server, test)


def test_progress_comes_step_by_step(server: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/trajectories", json=body(1)) as reply:
            assert reply.headers["content-type"].startswith("application/x-ndjson")
            events = [json.loads(line) async for line in reply.aiter_lines()]
        assert [event.get("step") for event in events] == [*range(1, 9), None]
        assert events[-1]["event"] == "result"

    with_client(server, test)


def test_what_is_refused_has_a_status_and_a_reason(server: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for content, status, reason in (
            (b"{", 400, "the body is not JSON"),
            (json.dumps({**body(0), "steps": 201}), 422, "steps=201 must be a whole number from 1 to 200"),
            (b" " * (2**20 + 1), 413, "the body has more than 1048576 bytes: send PNG images"),
        ):
            reply = await client.post("/trajectories", content=content)
            assert reply.status_code == status
            assert reason in reply.json()["error"]
        answers = (await client.get("/stats")).json()["answers"]
        assert answers["400"] >= 1
        metrics = (await client.get("/metrics")).text
        assert 'world_answers_total{status="413"} ' in metrics
        assert metrics.count('hero_fx_cached_steps_total{replica="') == REPLICAS

    with_client(server, test)


@pytest.mark.parametrize(
    ("failure", "status", "reason"),
    [
        (RayTaskError("denoise", "", hero_fx.OverBudget("no room")).as_instanceof_cause(), 503, "OverBudget: no room"),
        (RayTaskError("denoise", "", ValueError("wrong")).as_instanceof_cause(), 500, "ValueError: wrong"),
        (ActorDiedError(), 503, "the replica that ran this request has died"),
        (BackPressureError(2, 2), 503, "the queue is full"),
    ],
)
def test_failures_have_a_status_and_a_reason(failure: Exception, status: int, reason: str) -> None:
    refused = refused_for(failure)
    assert refused is not None
    assert refused.status == status
    assert reason in str(refused)
    assert (refused.retry_after is None) == (status == 500)


def test_a_client_that_goes_away_frees_its_session(server: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        before, other = await totals(client), await ask(client, body(5))
        async with client.stream("POST", "/trajectories", json=body(4, LONG)) as reply:
            lines = reply.aiter_lines()
            assert json.loads(await anext(lines))["step"] == 1
            assert same(await ask(client, body(5)), other)
            assert (await totals(client))["live"] == 1
        after = await until(client, nothing_is_left)
        assert after["cancelled"] == before["cancelled"] + 1

    with_client(server, test)


def test_a_client_may_go_away_while_it_waits(server: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        begun = asyncio.Semaphore(0)

        async def long(seed: int) -> None:
            async with client.stream("POST", "/trajectories", json=body(seed, LONG)) as reply:
                lines = reply.aiter_lines()
                await anext(lines)
                begun.release()
                async for _ in lines:
                    pass

        running = [asyncio.create_task(long(seed)) for seed in range(REPLICAS * LIVE)]
        for _ in running:
            await begun.acquire()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.post("/trajectories", json=body(9, LONG)), 0.1)
        await asyncio.gather(*running)

    with_client(server, test)


def test_more_requests_than_there_is_room_for_are_turned_away(server: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        room = REPLICAS * LIVE + QUEUED
        alone = await ask(client, body(0))
        turned_away = asyncio.Event()

        async def long(seed: int) -> int:
            async with client.stream("POST", "/trajectories", json=body(seed, LONG)) as reply:
                if reply.status_code == 503:
                    assert "the queue is full" in json.loads(await reply.aread())["error"]
                    assert int(reply.headers["retry-after"]) > 0
                    turned_away.set()
                    return 503
                await asyncio.wait_for(turned_away.wait(), 60)  # whoever ends or leaves makes room for another
                return reply.status_code  # and leaves, in the middle

        statuses = await asyncio.gather(*map(long, range(room + 4)))
        assert statuses.count(503) >= 1
        assert statuses.count(200) >= REPLICAS * LIVE
        await until(client, nothing_is_left)
        assert same(await ask(client, body(0)), alone)

    with_client(server, test)


def test_a_replica_that_is_killed_fails_its_requests_alone(server: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        alone = await ask(client, body(0))
        victim = (await client.get("/stats")).json()["replicas"][0]["process"]
        begun, all_begun = 0, asyncio.Event()

        async def long(seed: int) -> str:
            nonlocal begun
            async with client.stream("POST", "/trajectories", json=body(seed, LONG)) as reply:
                assert reply.status_code == 200
                events = []
                async for line in reply.aiter_lines():
                    begun += not events
                    if begun == REPLICAS * LIVE:
                        all_begun.set()
                    events.append(json.loads(line))
                return str(events[-1].get("error", events[-1]["event"]))

        running = [asyncio.create_task(long(seed)) for seed in range(REPLICAS * LIVE)]
        await asyncio.wait_for(all_begun.wait(), 60)
        os.kill(victim, signal.SIGKILL)
        ends = await asyncio.gather(*running)
        assert (
            sorted(end[:42] for end in ends)
            == ["result"] * LIVE + ["the replica that ran this request has died"] * LIVE
        )
        assert same(await ask(client, body(0)), alone)
        assert (await until(client, nothing_is_left))["replicas"] == REPLICAS  # Ray has started another one
        results = await asyncio.gather(*(ask(client, body(0)) for _ in range(4)))
        assert all(same(result, alone) for result in results)

    with_client(server, test)
