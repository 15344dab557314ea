"""Loads the server: requests arrive at random, whatever the server does, and each result is compared with the request alone.

    python examples/serve/load.py --rates 6,12,24 --count 40 --p95 10

First each of `--different` requests is sent alone: what comes back is what every later result must be, bit for bit. Then, for
each rate, `--count` requests arrive as a Poisson process. The table has latencies from arrival to the last line of the reply.
It ends at the first rate at which the server did not hold `--p95`. The exit status is 1 if a result differed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from serve.arrivals import Measured, arrivals, open_loop, summary
from serve.messages import png, unpack
from world.model import FRAMES, SIZE, TASKS
from world.render import render
from world.scenes import HELD_OUT, sample_scenes


def request(task: str, scene: int, steps: int | None = None, size: int = SIZE) -> dict[str, Any]:
    """A request for a held-out scene; its number is the seed, too."""
    clip = render(sample_scenes([HELD_OUT + scene]), FRAMES, size).rgb[0]
    frames = (clip.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    given = frames[[0, -1]] if task == "planning" else frames
    return {"task": task, "frames": [png(frame) for frame in given], "seed": scene, "steps": steps}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The result of a request.

    Raises:
        RuntimeError: the server refused it, or it failed; the message is the server's.
    """
    async with client.stream("POST", "/trajectories", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.status_code}: {json.loads(await reply.aread())['error']}")
        async for text in reply.aiter_lines():
            event = json.loads(text)
            if event["event"] == "error":
                raise RuntimeError(event["error"])
            if event["event"] == "result":
                return unpack(event["npz"])
    raise RuntimeError("the reply ended without a result")


def same(one: dict[str, np.ndarray[Any, Any]], other: dict[str, np.ndarray[Any, Any]]) -> bool:
    """Whether two results agree bit for bit."""
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


async def measure(client: httpx.AsyncClient, bodies: list[Any], alone: list[Any], times: list[float]) -> Measured:
    """Requests of several kinds in turn, arriving at these times."""

    async def send(i: int) -> str:
        kind = i % len(bodies)
        try:
            return "same" if same(await ask(client, bodies[kind]), alone[kind]) else "differs"
        except (RuntimeError, httpx.HTTPError) as error:
            return f"{type(error).__name__}: {error}"

    return summary(await open_loop(times, send))


async def run(arguments: argparse.Namespace) -> int:
    """Prints the table; the exit status."""
    bodies = [request(arguments.task, scene, arguments.steps) for scene in range(arguments.different)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=arguments.url, timeout=None, limits=limits) as client:
        alone = [await ask(client, body) for body in bodies]
        rows, held, differs = [], None, 0
        for rate in map(float, arguments.rates.split(",")):
            measured = await measure(client, bodies, alone, arrivals(rate, arguments.count, arguments.seed))
            differs += measured.statuses["differs"]
            others = ", ".join(f"{count} x {status}" for status, count in measured.statuses.items() if status != "same")
            rows.append((rate, measured.p50, measured.p95, measured.per_minute, measured.statuses["same"], others))
            print(".", end="", flush=True, file=sys.stderr)
            if not measured.held(arguments.p95):
                break
            held = rate
    headers = ("arrivals/min", "p50, s", "p95, s", "results/min", "as alone", "others")
    print("\n" + tabulate(rows, headers, tablefmt="github", floatfmt=".1f"))
    print(f"\nhighest rate with p95 <= {arguments.p95} s: {'none of these' if held is None else f'{held:g} a minute'}")
    return int(differs > 0)


def main(argv: list[str] | None = None) -> int:
    """Loads the server that is asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--task", default="planning", choices=TASKS)
    parser.add_argument("--steps", type=int, help="the task's usual number if not given")
    parser.add_argument("--rates", default="6,12,24", help="arrivals a minute, ascending, separated by commas")
    parser.add_argument("--count", type=int, default=40, help="requests at each rate")
    parser.add_argument("--different", type=int, default=4, help="requests that differ from each other")
    parser.add_argument("--p95", type=float, default=10.0, help="seconds within which 95 %% must have their result")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    return asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
