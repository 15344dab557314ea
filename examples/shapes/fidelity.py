"""The fidelity bench, shortened, on the model of moving shapes: does what holds on the world model hold on another family?

    python examples/shapes/fidelity.py --cache FOLDER [--results examples/shapes/results] [--clips 32] [--intervals 2,3,4,6]

Methods at equal numbers of full steps, calibrated plans fitted to eight training clips, and as rivals plain sampling and other
solvers with as many evaluations as HERO's FLOPs allow. Relative L2 on final latents, against full compute and against
converged sampling from the same noise, over held-out clips. What is sampled is kept in `--cache`, so a run can be cut off.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import hero_fx
from _fidelity_report import Row, figures
from _fidelity_run import Cost, Switch, digest
from _fidelity_settings import HERO, PLAN, Setting, full, methods
from _metrics import relative_l2
from hero_fx import passes
from shapes.clips import HELD_OUT, TRAINING, make_clips
from shapes.model import SHIFT
from shapes.pipeline import STEPS, WEIGHTS, ShapesPipeline
from shapes.report import SOLVERS, paired, plot, table

METHODS = (HERO, "HERO reuse", "TaylorSeer 1")
FITTED = 8
"""Training clips that plans are fitted to."""


def solver(name: str) -> Any:
    """A scheduler of diffusers of second order, for the noise levels of this model."""
    if name == "heun":
        return FlowMatchHeunDiscreteScheduler(shift=SHIFT)
    kind = {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}[name]
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, solver_order=2)


class Runner:
    """Samples held-out clips under settings, from one trace of the model."""

    def __init__(self, weights: Path, cache: Path, clips: int, search: int, num_steps: int = STEPS) -> None:
        """`clips`: how many, which go in one batch. `search`: schedules that a calibration may try."""
        self.weights, self.cache, self.clips, self.search, self.num_steps = weights, cache, clips, search, num_steps
        cache.mkdir(parents=True, exist_ok=True)
        self.pipeline = ShapesPipeline.from_pretrained(weights)
        self.pipeline.set_progress_bar_config(disable=True)
        self._usual = self.pipeline.scheduler
        code = [f for package in (hero_fx, passes) for f in sorted(Path(package.__path__[0]).rglob("*.py"))]
        self.code, self.known = digest(code), digest(sorted(weights.rglob("*.safetensors")))
        self.switch = Switch()
        self.pipeline.transformer = torch.compile(self.pipeline.transformer, backend=self.switch, fullgraph=True)
        self.pipeline.transformer.register_forward_pre_hook(float_timestep, with_kwargs=True)
        self._plans: dict[int, hero_fx.Plan] = {}

    def sample(self, setting: Setting) -> Tensor:
        """Latents [clips, 16, 4, 8, 8]; clip i starts from noise i."""
        path = self.cache / f"{self._key(setting)}.pt"
        if path.exists():
            kept: Tensor = torch.load(path, weights_only=True)
            return kept
        self.switch.backend = self._backend(setting)
        latents = self._denoise(setting)
        torch.save(latents, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        return latents

    def cost(self, setting: Setting) -> Cost:
        """Counted from the graphs, per clip: both calls of each step."""
        if self.switch.traced is None:
            self.switch.backend = None
            self._denoise(Setting("one step", steps=1))
        traced, backend = self.switch.traced, self._backend(setting)
        assert traced is not None
        if backend is None:
            each, steps = hero_fx.flops(traced.normal), evaluations(setting, self.num_steps)
            return Cost(steps, steps, 2 * each.gemm * steps // self.clips, 2 * each.total * steps // self.clips, 0)
        rewritten, policy = self.switch.rewritten(backend, traced), backend.config.make_policy()
        assert policy is not None
        fulls = hero_fx.step_kinds(backend.config, policy, self.num_steps).count(None)
        sums = hero_fx.trajectory_flops(rewritten, backend.config, self.num_steps)
        each = (2 * n // self.clips for n in (sums.gemm, sums.total, rewritten.state_bytes))
        return Cost(self.num_steps, fulls, *each)

    def plan(self, full_steps: int) -> hero_fx.Plan:
        """The calibrated plan with so many full steps, fitted to training clips; kept in the cache."""
        path = self.cache / f"plan-{self.known}-{self.num_steps}-{full_steps}-{self.search}-{FITTED}.safetensors"
        if full_steps not in self._plans and path.exists():
            self._plans[full_steps] = hero_fx.Plan.load(path)
        if full_steps not in self._plans:
            found = calibrated(self.weights, self.num_steps, full_steps, self.search, path.with_suffix(""))
            found.plan.save(path)
            found.plot(path.with_suffix(".png"))
            self._plans[full_steps] = found.plan
        return self._plans[full_steps]

    def _backend(self, setting: Setting) -> hero_fx.Backend | None:
        if setting.plan is not None:
            return hero_fx.backend(plan=self.plan(setting.plan), inner="eager")
        if setting.options is None:
            return None
        return hero_fx.backend(**{"num_steps": self.num_steps, **setting.options, "inner": "eager"})

    def _denoise(self, setting: Setting) -> Tensor:
        self.pipeline.scheduler = self._usual if setting.solver is None else solver(setting.solver)
        steps = self.num_steps if setting.steps is None else setting.steps
        return denoise(self.pipeline, HELD_OUT, range(self.clips), steps)

    def _key(self, setting: Setting) -> str:
        code = "" if setting.options is None and setting.plan is None else self.code
        of = [self.known, code, self.num_steps, self.search, setting.key, self.clips]
        if setting.plan is not None:
            of.append(FITTED)
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:24]


def float_timestep(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook: one graph for all solvers, whose timesteps are views of tables of all lengths, and of UniPC integers."""
    return args, {**kwargs, "timestep": kwargs["timestep"].clone().float()}


def denoise(pipeline: ShapesPipeline, first: int, numbers: Sequence[int], steps: int) -> Tensor:
    """Latents of clips `first + i`, each from noise i."""
    text = make_clips([first + i for i in numbers]).text
    generators = [torch.Generator().manual_seed(i) for i in numbers]
    latents: Tensor = pipeline(text, num_inference_steps=steps, generator=generators, output_type="latent").latents
    return latents


def evaluations(setting: Setting, num_steps: int) -> int:
    """Of the model, in a trajectory that caches nothing: Heun's method takes two a step, but one at the last."""
    steps = num_steps if setting.steps is None else setting.steps
    return 2 * steps - 1 if setting.solver == "heun" else steps


def calibrated(weights: Path, num_steps: int, full_steps: int, search: int, folder: Path) -> hero_fx.Calibration:
    """Fits a plan to training clips."""
    pipeline = ShapesPipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)

    def run(model: Any, i: int) -> Tensor:
        pipeline.transformer = model
        return denoise(pipeline, TRAINING, [i], num_steps)

    return hero_fx.calibrate(
        pipeline.transformer, run, num_steps=num_steps, budget=full_steps, scenes=FITTED, holdout=2, search=search,
        by=("frames",), folder=folder, inner="eager",
    )  # fmt: skip


class Bench:
    """Held-out clips, and what they are compared with."""

    def __init__(self, runner: Runner, converged: int) -> None:
        self.runner = runner
        self.full = runner.sample(full())
        self.converged = runner.sample(Setting("converged", steps=converged))
        self.plain = runner.cost(full())

    def row(self, setting: Setting) -> Row:
        """Samples and measures: latents and decoded clips, against full compute and converged sampling."""
        latents, decode, values = self.runner.sample(setting), self.runner.pipeline.vae.decode, {}
        for name, reference in (("l2", self.full), ("converged", self.converged)):
            if setting == full() and name == "l2":
                continue
            values[name] = relative_l2(latents.numpy(), reference.numpy())
            values[f"video_{name}"] = relative_l2(decode(latents).numpy(), decode(reference).numpy())
        return Row(setting, self.runner.cost(setting), values)

    def settings(self, interval: int) -> list[Setting]:
        """HERO, what stands beside it, and rivals with as many evaluations as its FLOPs allow."""
        found = {s.name.split(", N=")[0]: s for s in methods(interval)}
        cost = self.runner.cost(found[HERO])
        plan = Setting(f"{PLAN}, N={interval}", plan=cost.full_steps)
        return [
            *(found[name] for name in METHODS),
            plan,
            *rivals(round(cost.total * self.plain.steps / self.plain.total)),
        ]

    def main(self, intervals: Sequence[int]) -> list[dict[str, Any]]:
        """A row per setting; at each N compared with HERO."""
        result = [told(self.row(full()), self.plain)]
        for interval in intervals:
            hero, *rows = [self.row(s) for s in tqdm(self.settings(interval), desc=f"N={interval}")]
            known = {row["name"] for row in result}
            result += [told(row, self.plain, hero) for row in (hero, *rows) if row.setting.name not in known]
        return result


def told(row: Row, plain: Cost, hero: Row | None = None) -> dict[str, Any]:
    """Figures, and the distances of the latents clip by clip."""
    values = {
        name: [round(float(v), 6) for v in row.values[name]] for name in ("l2", "converged") if name in row.values
    }
    return {**figures(row, plain, hero), "values": values}


def rivals(evaluations: int) -> list[Setting]:
    """Plain sampling and other solvers with so many evaluations; Heun's method with one less where that is even."""
    found = [Setting(f"plain, {evaluations} steps", steps=evaluations)]
    for name, title in SOLVERS.items():
        steps = (evaluations + 1) // 2 if name == "heun" else evaluations
        found.append(Setting(f"{title}, {steps} steps", steps=steps, solver=name))
    return found


def sheet(bench: Bench, settings: Sequence[Setting], path: Path, clips: int = 3) -> None:
    """Every second frame of the first clips: what was made from the same words, and under each setting."""
    from matplotlib.image import imsave

    decode = bench.runner.pipeline.vae.decode
    made = [make_clips(range(HELD_OUT, HELD_OUT + clips)).video]
    made += [decode(bench.runner.sample(setting)[:clips]) for setting in settings]
    rows = [torch.cat([video[i, :, f] for f in range(0, 8, 2)], dim=2) for i in range(clips) for video in made]
    image = torch.cat(rows, dim=1).movedim(0, 2).repeat_interleave(3, 0).repeat_interleave(3, 1)
    imsave(path, image.numpy())


def main(argv: list[str] | None = None) -> None:
    """Runs, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what was sampled, and for plans")
    parser.add_argument("--results", type=Path, help="folder for JSON, table and pictures")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--search", type=int, default=30, help="schedules that a calibration may try")
    parser.add_argument("--converged", type=int, default=100, help="steps of converged sampling")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--intervals", type=lambda text: [int(n) for n in text.split(",")], default=[2, 3, 4, 6])
    options = parser.parse_args(argv)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=256):
        runner = Runner(options.weights, options.cache, options.clips, options.search, options.steps)
        bench = Bench(runner, options.converged)
        rows = bench.main(options.intervals)
        if options.results is not None:
            options.results.mkdir(parents=True, exist_ok=True)
            found = {"clips": options.clips, "converged": options.converged, "search": options.search, "rows": rows}
            (options.results / "fidelity.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
            plot(rows, options.results / "fidelity.png")
            hero, _, _, plan, *_ = bench.settings(options.intervals[-1])
            sheet(bench, [full(), hero, plan], options.results / "clips.png")
    print(table(rows), paired(rows), sep="\n\n")


if __name__ == "__main__":
    main()
