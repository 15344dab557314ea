"""A small world model imagines clips with plain torch.compile, with HERO and with a calibrated plan: a table and pictures.

    python examples/quickstart.py

The model in `examples/world/` has Aether's layout at a size for a CPU: a CogVideoX transformer that denoises RGB, disparity
and camera rays together. Given the first and the last frame of scenes it has never seen, it imagines the frames between,
their depth and the camera's path (planning: 50 DDIM steps, classifier-free guidance as a batch of two). The plan in
`examples/world/plans/` was learned by `hero_fx.calibrate` on training scenes. Each way of running the model has a process of
its own. They compile beside each other, which is most of the wait, and then take turns, so that whatever else the machine
does slows all of them.
"""

from __future__ import annotations

import argparse
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from _quickstart_processes import Apart, Here, Settings
from world.settings import PLANS, STEPS, TASKS, WEIGHTS


def ways_of(arguments: argparse.Namespace, settings: Settings) -> list[Here | Apart]:
    """The model compiled in every way that is compared."""
    options: dict[str, dict[str, Any] | None] = {
        "torch.compile": None,
        "HERO": {"interval": arguments.interval, "num_steps": settings.steps},
    }
    shipped = settings.weights == WEIGHTS and settings.steps == STEPS[settings.task]
    path = arguments.plan or (PLANS / f"{settings.task}.safetensors" if shipped else None)
    if path is None:
        print(f"no plan: the shipped ones are for the shipped weights and {STEPS[settings.task]} steps; see --plan")
    else:
        options["plan"] = {"plan": path}
    together = arguments.one_process or settings.inner == "eager"  # nothing to compile
    return [(Here if together else Apart)(name, settings, of_way) for name, of_way in options.items()]


def first_calls(ways: list[Here | Apart]) -> None:
    """Lets all ways compile, beside each other where they have processes of their own, and says what each took."""
    with tqdm(total=len(ways), desc="compiled") as bar:
        waited: dict[Future[float], str] = {}

        def look(seconds: float) -> None:
            done, _ = wait(waited, timeout=seconds, return_when=FIRST_COMPLETED)
            for future in done:
                bar.write(f"{waited.pop(future)}: first call took {future.result():.0f} s")
            bar.update(len(done))
            bar.refresh()  # the clock

        for way in ways:
            waited[way.ask("first_call")] = way.name
            look(0)
        while waited:
            look(1)


def main(argv: list[str] | None = None) -> None:
    """Compiles all ways, denoises in turns, prints the table, saves the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="planning", choices=TASKS)
    parser.add_argument("--steps", type=int, help="50 for planning, 30 for reconstruction if not given")
    parser.add_argument("--interval", type=int, default=2, help="N: a full step every N steps")
    parser.add_argument("--scenes", type=int, default=3, help="denoised as one batch; the pictures show three")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turns; several for figures to rely on")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--one-process", action="store_true", help="compile one way after the other, in less memory")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a saved pipeline")
    parser.add_argument("--plan", type=Path, help="a calibrated plan; the shipped one for shipped weights if not given")
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"), help="the animation is saved beside it")
    arguments = parser.parse_args(argv)
    for name in ("steps", "interval", "scenes", "rounds"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            parser.error(f"--{name} {given}: at least 1")
    if not (arguments.weights / "model_index.json").is_file():
        parser.error(
            f"--weights {arguments.weights}: not the folder of a saved pipeline, there is no model_index.json in it"
        )
    if arguments.plan is not None and not arguments.plan.is_file():
        parser.error(f"--plan {arguments.plan}: there is no such file; `hero_fx.Plan.save` writes one")
    task, steps = arguments.task, arguments.steps or STEPS[arguments.task]
    ways = ways_of(arguments, Settings(arguments.weights, task, steps, arguments.scenes, arguments.inner))
    try:
        descriptions = [way.ask("description") for way in ways]
        # They import torch, and so does this process.
        from _quickstart_pictures import animate, picture
        from _quickstart_report import report
        from _quickstart_ways import clips_of

        of_model, *_ = [
            description.result() for description in descriptions
        ]  # what cannot be run ends here, not after minutes
        print(f"{of_model}\ncompiling {', '.join(way.name for way in ways)} ...", flush=True)
        first_calls(ways)
        for way in arguments.rounds * ways:
            way.ask("denoise").result()
        outcomes = {way.name: way.ask("outcome").result() for way in ways}
    finally:
        for way in ways:
            way.close()
    clips = clips_of(arguments.scenes)
    print("\n" + report(outcomes, clips))
    worlds = {"truth": clips, **{name: of.output for name, of in outcomes.items()}}
    frames = clips.rgb.shape[1]
    picture(worlds, arguments.picture, given=(0, frames - 1) if task == "planning" else range(frames))
    animation = arguments.picture.with_suffix(".gif")
    animate(worlds, animation)
    print(f"\nframes side by side: {arguments.picture}\nthe same, moving: {animation}")


if __name__ == "__main__":
    main()
