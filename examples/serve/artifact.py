"""Saves the compiled world model, so that a server starts without compiling.

    python examples/serve/artifact.py --out build/serve

It compiles each task at one clip a request, runs a step, and writes `<task>.hero`; see `hero_fx.save`. It takes some minutes.
Save with as many `--threads` as a replica will have: they are part of the compiled code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import hero_fx
from serve.models import GIVEN, SYSTEMS, Settings, file_of, make
from world.pipeline import WEIGHTS


def save(settings: Settings, folder: Path) -> None:
    """Writes a file for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    models, _ = make(settings)
    for task, model in models.items():
        model.warm_up()
        hero_fx.save(model.transformer, file_of(folder, task))
        print(f"{file_of(folder, task)}: {file_of(folder, task).stat().st_size / 1e6:.1f} MB", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Saves the tasks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--system", default="plan", choices=[name for name in SYSTEMS if name != "plain"])
    parser.add_argument("--tasks", default=",".join(GIVEN), help="separated by commas")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a saved pipeline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-state-mb", type=float, help="bound on the feature state of a task, in all its sessions")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    save(
        Settings(
            system=arguments.system,
            tasks=tuple(arguments.tasks.split(",")),
            weights=arguments.weights,
            max_state_bytes=arguments.max_state_mb and int(arguments.max_state_mb * 1e6),
        ),
        arguments.out,
    )


if __name__ == "__main__":
    main()
