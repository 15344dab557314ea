"""Serves the world model over HTTP until it is interrupted.

    python examples/serve/artifact.py --out build/serve        # once: compiles and saves
    python examples/serve/app.py --artifacts build/serve       # starts without compiling
    python examples/serve/load.py --rates 6,12                 # in another terminal

Without `--artifacts` each replica compiles when it starts. `--system plain` is plain `torch.compile`, to compare with.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import ray
from ray import serve

sys.path.insert(0, str(Path(__file__).parents[1]))

from serve.deployment import application, environment
from serve.models import GIVEN, SYSTEMS, Settings
from world.pipeline import WEIGHTS

NAME = "world"


def start(settings: Settings, *, port: int, replicas: int = 1, threads: int = 1, queued: int = 16) -> None:
    """Starts Ray and the deployments here, and comes back when all replicas are up."""
    ray.init(
        num_cpus=replicas * threads,
        include_dashboard=False,
        runtime_env=environment(),
        configure_logging=False,
        log_to_driver=False,
    )
    serve.start(http_options=serve.HTTPOptions(host="127.0.0.1", port=port))
    serve.run(application(settings, replicas=replicas, threads=threads, queued=queued), name=NAME)


def stop() -> None:
    """Ends what `start` started."""
    serve.shutdown()
    ray.shutdown()


def main(argv: list[str] | None = None) -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="plan", choices=SYSTEMS)
    parser.add_argument("--tasks", default=",".join(GIVEN), help="separated by commas")
    parser.add_argument(
        "--artifacts", type=Path, help="folder that artifact.py wrote; compiles at the start if not given"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a saved pipeline")
    parser.add_argument("--inner", default="inductor", help="what compiles where no artifacts are given")
    parser.add_argument("--replicas", type=int, default=1, help="processes with a model each")
    parser.add_argument("--threads", type=int, default=2, help="processors of each replica")
    parser.add_argument("--live", type=int, default=2, help="trajectories that take turns in a replica")
    parser.add_argument("--queued", type=int, default=16, help="requests that may wait; more are turned away")
    parser.add_argument(
        "--max-state-mb", type=float, help="bound on the feature state of a task where it is compiled here"
    )
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args(argv)
    try:
        settings = Settings(
            system=arguments.system,
            tasks=tuple(arguments.tasks.split(",")),
            weights=arguments.weights.resolve(),
            artifacts=arguments.artifacts and arguments.artifacts.resolve(),
            inner=arguments.inner,
            live=arguments.live,
            max_state_bytes=arguments.max_state_mb and int(arguments.max_state_mb * 1e6),
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        start(
            settings,
            port=arguments.port,
            replicas=arguments.replicas,
            threads=arguments.threads,
            queued=arguments.queued,
        )
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put its own in place
            signal.signal(number, signal.default_int_handler)
        print(f"serving at http://127.0.0.1:{arguments.port}/trajectories; /stats and /metrics beside it", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        stop()


if __name__ == "__main__":
    main()
