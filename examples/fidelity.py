"""What caching costs in quality, on the world model of `examples/world`: every method at equal numbers of full steps.

    python examples/fidelity.py [--scenes 64] [--tasks planning,reconstruction] [--results FOLDER] [--json]
    python examples/fidelity.py --scenes 8 --intervals 2,4                  # a quick look
    python examples/fidelity.py --tables alpha,layers --scenes 16           # ablations over α and M at N=2
    python examples/fidelity.py --choices --scenes 16                       # HERO's open choices
    python examples/fidelity.py --tables stability --scenes 8               # how stable the layers are (paper, Figure 5)

Held-out scenes, one noise per scene. Three distances say different things. To *full compute* of as many steps: what caching
changes. To *converged* sampling (200 steps from the same noise): whether the change is for the worse, for full compute is no
truth. To the *rendered truth*: whether anyone would notice; in planning the truth is one of many possible futures. Beside the
methods stands plain sampling with fewer steps at HERO's FLOPs, attention's included, and with timesteps that are not rounded.

With `--plans` stand calibrated plans with as many full steps as HERO, fitted to training scenes alone, by halves where there
is guidance; with `--rivals`
DPM-Solver++ 2M and UniPC with as many evaluations of the model as HERO has full steps, other schedules of HERO with as many
(`others`), and `cache-dit`, which must be installed, with HERO's full steps.

Depth is aligned by the median of the ratios, one scale per clip; camera trajectories by Sim(3). ± is half of the 95 % bootstrap
interval over scenes; ▲ and ▼ mark what is surely better or worse than HERO at the same N: the interval of the difference,
scene by scene, is on one side of 0. What is sampled is kept in `--cache`, so a run can be cut off and extended.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from _fidelity_plans import Calibrating, check_options
from _fidelity_report import TO_FULL, TO_TRUTH, Row, figures, glance, measure, plot, summary, table, triple
from _fidelity_rivals import rivals
from _fidelity_run import Runner
from _fidelity_settings import APART, CHOICES, HERO, METHODS, PLAN, Setting, alphas, boundaries, choices, full, methods
from world.pipeline import GUIDANCE, STEPS, WEIGHTS

RIVALS = ("others", "cache-dit")
TABLES = ("main", "alpha", "layers", "choices", "stability")
TITLES = {"main": "method", "alpha": "α at M = 16/42 of the depth, N=2", "layers": "M at α = 1/6, N=2"}


class Bench:
    """One task on a number of scenes."""

    def __init__(self, runner: Runner, task: str, scenes: int, converged: int, converged_scenes: int) -> None:
        self.runner, self.task, self.scenes = runner, task, scenes
        self.truth = runner.truth(scenes)
        (self.full,) = runner.sample(task, [full()], scenes, "full compute")
        self.plain = runner.cost(task, full())
        self.converged = None
        if converged:
            (self.converged,) = runner.sample(
                task, [Setting("converged", steps=converged)], min(scenes, converged_scenes), "converged"
            )

    def rows(self, settings: Sequence[Setting], label: str) -> list[Row]:
        """Samples and measures."""
        sampled = self.runner.sample(self.task, settings, self.scenes, label)
        return [
            Row(s, self.runner.cost(self.task, s), measure(latents, self._reference(s), self.converged, self.truth))
            for s, latents in zip(settings, sampled, strict=True)
        ]

    def main(
        self, intervals: Sequence[int], only: Sequence[str], plans: Sequence[bool], more: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Tables 1 and 2: methods at every N, and fewer steps at HERO's FLOPs; `plans`: calibrated ones of as many full
        steps, for each whether the halves of guidance have full steps of their own; `more`: rivals."""
        result = [self._figures(self.rows([full()], "full compute")[0])]
        for interval in intervals:
            settings = [s for s in methods(interval) if s.name.split(", N=")[0] in (HERO, *only)]
            (hero,) = (s for s in settings if s.name.split(", N=")[0] == HERO)
            steps = round(self.runner.cost(self.task, hero).total * self.plain.steps / self.plain.total)
            fewer = Setting(f"plain, {steps} steps", steps=steps)
            if all(row["name"] != fewer.name for row in result):
                settings.append(fewer)
            fulls = self.runner.cost(self.task, hero).full_steps
            settings += [
                Setting(f"{APART if apart else PLAN}, N={interval}", plan=fulls, apart=apart) for apart in plans
            ]
            known = {row["name"] for row in result}
            if more:
                found = rivals(interval, self.plain.steps, cache_dit="cache-dit" in more)
                settings += [s for s in found if s.name not in known and ("others" in more or s.cache_dit is not None)]
            rows = self.rows(settings, f"N={interval}")
            base = next(row for row in rows if row.setting is hero)
            result += [{**self._figures(row, base), "interval": interval} for row in rows]
        return result

    def ablation(self, settings: Sequence[Setting], label: str) -> list[dict[str, Any]]:
        """Tables 3 and 4; compared with the default at N=2."""
        hero, *rows = self.rows([Setting("HERO", {"interval": 2}), *settings], label)
        return [self._figures(row, hero) for row in rows]

    def choices(self, intervals: Sequence[int], only: Sequence[str] | None) -> dict[str, list[dict[str, Any]]]:
        """By N: HERO with one choice changed at a time, compared with the default at the same N."""
        result = {}
        for interval in intervals:
            named = choices(interval, only)
            rows = self.rows([setting for _, setting in named], f"choices, N={interval}")
            result[str(interval)] = [
                {"choice": choice, **self._figures(row, rows[0])} for (choice, _), row in zip(named, rows, strict=True)
            ]
        return result

    def stability(self, results: Path | None) -> dict[str, Any]:
        """Section 3.2: the stability of the layers, of their updates and of the hidden states behind them."""
        found = {}
        for features in ("update", "hidden"):
            measured = self.runner.stability(self.task, min(self.scenes, self.runner.batch), features)
            if results is not None:
                results.mkdir(parents=True, exist_ok=True)
                measured.plot(results / f"stability-{features}-{self.task}.png")
            found[features] = {
                **{name: getattr(measured, name) for name in ("variance", "score", "boundary")},
                **{name: getattr(measured, name) for name in ("relative", "relative_score", "relative_boundary")},
                "text": str(measured),
            }
        return found

    def _reference(self, setting: Setting) -> torch.Tensor | None:
        return None if setting == full() else self.full

    def _figures(self, row: Row, hero: Row | None = None) -> dict[str, Any]:
        return figures(row, self.plain, hero)


def choice_table(found: dict[str, list[dict[str, Any]]], form: str = "github") -> str:
    """One line per choice; in each cell the relative L2 of RGB / disparity / raymap to full compute, in thousandths."""

    first = next(iter(found.values()))
    lines = []
    for i, row in enumerate(first):
        cells = [triple(rows[i]["metrics"], "l2") for rows in found.values()]
        lines.append([row["choice"], row["name"], *cells, f"{row['speed_total']:.2f}", f"{row['state_mb']:.2f}"])
    heads = ["choice", "value", *[f"N={n}" for n in found], f"speed at N={next(iter(found))}", "state, MB per clip"]
    return tabulate(lines, headers=heads, tablefmt=form, disable_numparse=True)


def report(found: dict[str, Any]) -> str:
    """All tables in Markdown."""
    parts = []
    for task, tables in found["tasks"].items():
        parts.append(f"## {task.capitalize()}, {STEPS[task]} steps, {found['scenes']} scenes")
        for name, title in TITLES.items():
            if name in tables:
                if name == "main":
                    parts.append(
                        f"### relative L2 to full compute, ‰: RGB / disparity / raymap (speed)\n\n{glance(tables[name])}"
                    )
                parts.append(f"### {name}: summary\n\n{summary(tables[name], title)}")
                parts.append(f"### {name}: to full compute\n\n{table(tables[name], TO_FULL, title)}")
                parts.append(
                    f"### {name}: to converged sampling and to the truth\n\n{table(tables[name], TO_TRUTH, title)}"
                )
        for features, measured in tables.get("stability", {}).items():
            parts.append(f"### stability of the layers, {features}\n\n```\n{measured['text']}\n```")
        if "choices" in tables:
            parts.append(
                f"### choices (relative L2 in thousandths: RGB / disparity / raymap)\n\n{choice_table(tables['choices'])}"
            )
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Everything that was asked for, as JSON."""
    how = Calibrating(
        arguments.calibration_scenes, arguments.search, arguments.fitted_on, arguments.fitted_guidance, arguments.start_plan,
        arguments.closed_loop,
    )  # fmt: skip
    runner = Runner(arguments.weights, cache, arguments.batch, how)
    result: dict[str, Any] = {
        "weights": runner.weights,
        "code": runner.code,
        "torch": torch.__version__,
        "scenes": arguments.scenes,
        "converged": {"steps": arguments.converged, "scenes": min(arguments.scenes, arguments.converged_scenes)},
        "tasks": {},
    }
    for task in arguments.tasks:
        bench = Bench(runner, task, arguments.scenes, arguments.converged, arguments.converged_scenes)
        tables: dict[str, Any] = {}
        result["tasks"][task] = tables
        if "main" in arguments.tables:
            apart = GUIDANCE[task] > 1
            kinds = [False, True] if apart and arguments.together else [apart]
            plans = kinds if arguments.plans else []
            tables["main"] = bench.main(arguments.intervals, arguments.methods, plans, arguments.rivals)
        if "alpha" in arguments.tables:
            tables["alpha"] = bench.ablation(alphas(runner.depth), "α")
        if "layers" in arguments.tables:
            tables["layers"] = bench.ablation(boundaries(runner.depth), "M")
        if "choices" in arguments.tables:
            tables["choices"] = bench.choices(arguments.intervals, arguments.only)
        if "stability" in arguments.tables:
            tables["stability"] = bench.stability(arguments.results)
        if arguments.results is not None:
            save(result, arguments.results)
    return result


def save(result: dict[str, Any], folder: Path) -> None:
    """Writes what there is: `fidelity.json`, `tables.md` and a plot per task."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fidelity.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    names = dict.fromkeys(name for tables in result["tasks"].values() for name in tables)
    title = f"Caching on the world model: {', '.join(names)}"
    made = f"Written by `examples/fidelity.py`: weights {result['weights']}, torch {result['torch']}."
    (folder / "tables.md").write_text(f"# {title}\n\n{made}\n\n{report(result)}\n")
    for task, tables in result["tasks"].items():
        if "main" in tables:
            plot(tables["main"], f"{task}, {STEPS[task]} steps, {result['scenes']} scenes", folder / f"{task}.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""

    def listed(kind: Any, allowed: Sequence[str] | None = None) -> Any:
        def convert(text: str) -> list[Any]:
            values = [kind(part) for part in text.split(",")]
            if allowed is not None and (unknown := [v for v in values if v not in allowed]):
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is unknown; choose from {', '.join(allowed)}")
            return values

        return convert

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the pipeline")
    parser.add_argument("--tasks", type=listed(str, tuple(STEPS)), default=list(STEPS))
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--tables", type=listed(str, TABLES), default=["main"], help=f"of {', '.join(TABLES)}")
    parser.add_argument("--choices", action="store_true", help="the same as --tables choices")
    parser.add_argument("--only", type=listed(str, tuple(CHOICES)), help="of the choices, these")
    parser.add_argument("--methods", type=listed(str, tuple(METHODS)), default=list(METHODS), help="beside HERO")
    parser.add_argument("--plans", action="store_true", help="also plans, calibrated on training scenes")
    parser.add_argument(
        "--together", action="store_true", help="where there is guidance, also plans with one schedule for both halves"
    )
    parser.add_argument("--rivals", type=listed(str, RIVALS), default=[], help=f"also rivals, of {', '.join(RIVALS)}")
    parser.add_argument(
        "--calibration-scenes", type=int, default=Calibrating.scenes, help="scenes that plans are fitted to"
    )
    parser.add_argument("--search", type=int, default=Calibrating.search, help="schedules that a calibration may try")
    parser.add_argument("--fitted-on", choices=tuple(STEPS), help="fit plans to this task, use them on each")
    parser.add_argument("--fitted-guidance", type=float, help="fit plans at this guidance scale")
    parser.add_argument(
        "--start-plan", type=Path, help="a plan to start with where N has its full steps; kept with --search 1"
    )
    parser.add_argument(
        "--closed-loop",
        type=int,
        default=Calibrating.closed_loop,
        help="rounds of a calibration in the closed loop; 0 for none",
    )
    parser.add_argument("--intervals", type=listed(int), help="values of N; 2,3,4, and for choices 2,3,4,6")
    parser.add_argument("--converged", type=int, default=200, help="steps of converged sampling; 0 for none")
    parser.add_argument("--converged-scenes", type=int, default=64, help="at most so many scenes of it")
    parser.add_argument("--batch", type=int, default=16, help="scenes per batch")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--cache", type=Path, help="folder for what was sampled; by default nothing stays")
    parser.add_argument("--results", type=Path, help="folder for JSON, tables and plots")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args(argv)
    if arguments.choices:
        arguments.tables = ["choices"]
    if arguments.intervals is None:
        arguments.intervals = [2, 3, 4, 6] if arguments.tables == ["choices"] else [2, 3, 4]
    if arguments.scenes < 1 or arguments.batch < 1:
        parser.error(f"--scenes {arguments.scenes} --batch {arguments.batch}: at least 1")
    if not (arguments.weights / "model_index.json").exists():
        parser.error(f"--weights {arguments.weights}: there is no pipeline; train one with examples/world/train.py")
    try:
        check_options(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Runs and prints."""
    arguments = parse(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # One model is compiled for every size of a batch, and once more by each calibration.
    unlimited = torch._dynamo.config.patch(recompile_limit=256)
    with torch.no_grad(), unlimited, tempfile.TemporaryDirectory() as folder:
        result = run(arguments, arguments.cache or Path(folder))
    print(json.dumps(result, indent=1, allow_nan=False) if arguments.json else report(result))


if __name__ == "__main__":
    main()
