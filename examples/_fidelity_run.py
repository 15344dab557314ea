"""Runs the world model on held-out scenes under many settings, from one trace of the model, and keeps what comes out."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

import hero_fx
from _fidelity_plans import Calibrating, plan_for
from _fidelity_rivals import cache_dit_on, solver
from _fidelity_settings import Setting
from hero_fx import passes
from hero_fx.find_timestep import find_timestep
from hero_fx.passes.rewrite.observe import Features
from hero_fx.passes.slots import slots_of
from hero_fx.runtime.inputs import graph_inputs
from hero_fx.runtime.planned import planned_for
from hero_fx.runtime.stepper import CompiledStep, Stepper
from hero_fx.stability import Recorder, Stability
from world.latents import encode
from world.model import FRAMES, SIZE
from world.pipeline import GUIDANCE, STEPS, WorldModelPipeline
from world.render import render
from world.scenes import HELD_OUT, sample_scenes

__all__ = ["Cost", "Runner", "Switch", "Truth", "digest"]


@dataclass(frozen=True)
class Cost:
    """What a trajectory of one clip costs."""

    steps: int
    full_steps: int
    gemm: int
    """FLOPs of matrix products and convolutions, as the paper counts."""
    total: int
    """With attention's."""
    state: int
    """Bytes of feature state."""


@dataclass(frozen=True)
class Truth:
    """Held-out scenes as they are."""

    latents: Tensor
    """[scenes, F, channels, height, width]"""
    depth: Tensor
    """[scenes, F, S, S] in metres."""
    poses: Tensor
    """[scenes, F, 4, 4] camera-to-first-camera."""


class ExactSteps(CogVideoXDDIMScheduler):  # type: ignore[misc]
    """The same sampler, stepping from each timestep to the next one of its table.

    diffusers' goes back by 1000 // n timesteps from each, which leaves noise where n does not divide 1000: with 18 steps it
    doubles the distance to 30 steps. Plain sampling with fewer steps is to be a fair rival.
    """

    def step(self, velocity: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        """DDIM without noise (Song et al. 2020, Eq. 12) for v-prediction: from `timestep` to the next one."""
        times = self.timesteps.tolist()
        following = times.index(int(timestep)) + 1
        now = self.alphas_cumprod[int(timestep)]
        then = self.alphas_cumprod[times[following]] if following < len(times) else self.final_alpha_cumprod
        clean = now.sqrt() * sample - (1 - now).sqrt() * velocity
        noise = now.sqrt() * velocity + (1 - now).sqrt() * sample
        return (then.sqrt() * clean + (1 - then).sqrt() * noise,)


class Switch:
    """A torch.compile backend that captures the model once and then runs it by whatever options are set.

    Every setting is rewritten from the same trace and run without Inductor, whose compile time would be more than the
    run itself at this size.
    """

    def __init__(self) -> None:
        self.backend: hero_fx.Backend | None = None
        """Options of the calls to come; None: the model as it is."""
        self.traced: hero_fx.StepGraphs | None = None
        """Of the graph that was called last."""
        self._made: tuple[hero_fx.Backend, hero_fx.StepGraphs, Stepper] | None = None
        self._rewritten: dict[tuple[hero_fx.Config, int], hero_fx.StepGraphs] = {}

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Takes one Dynamo graph."""
        steps = hero_fx.backend("fora").trace(gm, inputs)
        timestep = find_timestep(steps.normal, None)

        def call(*values: Any) -> Any:
            self.traced = steps
            if self.backend is None:
                return gm.forward(*values)
            if self._made is None or self._made[0] is not self.backend or self._made[1] is not steps:
                made = stepper(self.backend, self.rewritten(self.backend, steps), timestep)
                self._made = (self.backend, steps, made)
            return self._made[2](*values)

        return call

    def rewritten(self, backend: hero_fx.Backend, steps: hero_fx.StepGraphs) -> hero_fx.StepGraphs:
        """The step graphs for a backend's options; the schedule is not in them, and N only in the scores of ToCa and DuCa."""
        config = replace(backend.config, schedule="uniform", num_steps=None)
        if config.policy not in ("toca", "duca"):
            config = replace(config, interval=2)
        if (config, id(steps)) not in self._rewritten:
            self._rewritten[config, id(steps)] = backend.rewrite(steps)
        return self._rewritten[config, id(steps)]


def stepper(backend: hero_fx.Backend, steps: hero_fx.StepGraphs, timestep: int) -> Stepper:
    """What `backend` would compile with `inner="eager"`, from step graphs that are rewritten already."""
    policy = backend.config.make_policy()
    assert policy is not None, "full compute needs no stepper"

    def step(gm: fx.GraphModule) -> CompiledStep:
        return CompiledStep(gm.forward, tuple(slot for _, slot in slots_of(gm)), torch.device("cpu"))

    return Stepper(
        full=step(steps.full),
        cached=[step(gm) for gm in steps.cached],
        policy=policy,
        schedule=backend.config.schedule_of,
        state=steps.state,
        sampler=steps.sampler,
        inputs=graph_inputs(steps, timestep),
        planned=planned_for(backend.config),
    )


class Runner:
    """Samples scenes under settings; results are kept in a folder, so that a run can be cut off, resumed and extended."""

    def __init__(
        self, weights: Path, cache: Path | None, batch: int = 16, calibrating: Calibrating | None = None
    ) -> None:
        """`weights`: a folder that `WorldModelPipeline.save_pretrained` wrote. `cache`: a folder for what is sampled, and for
        plans."""
        self.folder, self.calibrating = weights, calibrating or Calibrating()
        self._plans: dict[tuple[str, int, bool], hero_fx.Plan] = {}
        self.pipeline = WorldModelPipeline.from_pretrained(weights)
        self.pipeline.set_progress_bar_config(disable=True)
        self._usual = self.pipeline.scheduler
        self._exact = ExactSteps.from_config(self._usual.config)
        self.depth = int(self.pipeline.transformer.config.num_layers)
        self.batch, self.cache = batch, cache
        self.weights = digest(sorted(weights.rglob("*.safetensors")))
        self.code = digest(
            [f for package in (hero_fx, passes) for f in sorted(Path(package.__path__[0]).rglob("*.py"))]
        )
        self.switch = Switch()
        self.pipeline.transformer = torch.compile(self.pipeline.transformer, backend=self.switch, fullgraph=True)
        # The pipeline passes a view of its table of timesteps, and Dynamo would compile anew for every length of the table.
        self.pipeline.transformer.register_forward_pre_hook(_own_timestep, with_kwargs=True)
        self._traced: dict[str, hero_fx.StepGraphs] = {}
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)

    def batches(self, scenes: int) -> list[range]:
        """The scenes in batches; all of one size if that divides them."""
        return [range(start, min(start + self.batch, scenes)) for start in range(0, scenes, self.batch)]

    def truth(self, scenes: int) -> Truth:
        """The first held-out scenes, rendered."""
        clips = render(sample_scenes([HELD_OUT + i for i in range(scenes)]), FRAMES, SIZE)
        return Truth(encode(clips), clips.depth, clips.poses)

    def sample(self, task: str, settings: Sequence[Setting], scenes: int, label: str) -> list[Tensor]:
        """Latents [scenes, F, channels, height, width] of every setting, each from the same noise."""
        parts: dict[tuple[str, range], Tensor] = {}
        bar = tqdm(total=len(settings) * scenes, desc=f"{task}, {label}", unit="clip")
        for setting in settings:
            self.switch.backend = self._backend(task, setting)
            for numbers in self.batches(scenes):
                parts[setting.key, numbers] = self._batch(task, setting, numbers)
                bar.update(len(numbers))
        bar.close()
        return [torch.cat([parts[setting.key, numbers] for numbers in self.batches(scenes)]) for setting in settings]

    def cost(self, task: str, setting: Setting) -> Cost:
        """Counted from the graphs, per clip."""
        path = self._path(task, setting, None)
        if path is not None and path.exists():
            return Cost(**json.loads(path.read_text()))
        steps = STEPS[task] if setting.steps is None else setting.steps
        traced, batch, backend = self._trace(task), self.batch, self._backend(task, setting)
        if setting.cache_dit is not None:
            gemm, total = self._counted(task, setting)
            cost = Cost(steps, sum(setting.cache_dit), gemm, total, 0)
        elif backend is None:
            each = hero_fx.flops(traced.normal)
            cost = Cost(steps, steps, each.gemm * steps // batch, each.total * steps // batch, 0)
        else:
            rewritten, policy = self.switch.rewritten(backend, traced), backend.config.make_policy()
            assert policy is not None
            fulls = setting.plan or hero_fx.step_kinds(backend.config, policy, steps).count(None)
            sums = hero_fx.trajectory_flops(rewritten, backend.config, steps)
            cost = Cost(steps, fulls, sums.gemm // batch, sums.total // batch, rewritten.state_bytes // batch)
        if path is not None:
            path.write_text(json.dumps(asdict(cost)))
        return cost

    def stability(self, task: str, scenes: int, features: Features) -> Stability:
        """How the features of the layers move along a trajectory of full compute (paper, section 3.2)."""
        recorder = Recorder(features=features, inner="eager")
        compiled = self.pipeline.transformer
        self.pipeline.transformer = torch.compile(compiled._orig_mod, backend=recorder, fullgraph=True)
        self.pipeline.transformer.register_forward_pre_hook(_own_timestep, with_kwargs=True)
        try:
            self._denoise(task, range(scenes), Setting("full compute"))
        finally:
            self.pipeline.transformer = compiled
        return recorder.stability()

    def _batch(self, task: str, setting: Setting, numbers: range) -> Tensor:
        path = self._path(task, setting, numbers)
        if path is not None and path.exists():
            kept: Tensor = torch.load(path, weights_only=True)
            return kept
        latents = self._denoise(task, numbers, setting)
        if path is not None:
            torch.save(latents, path)
        return latents

    def _denoise(self, task: str, numbers: Sequence[int], setting: Setting) -> Tensor:
        clips = render(sample_scenes([HELD_OUT + i for i in numbers]), FRAMES, SIZE)
        self.pipeline.scheduler = self._usual if setting.steps is None else self._exact
        if setting.solver is not None:
            self.pipeline.scheduler = solver(setting.solver, self._usual)
        with self._cached_elsewhere(setting):
            return self._latents(clips.rgb, task, numbers, setting.steps)

    @contextmanager
    def _cached_elsewhere(self, setting: Setting) -> Iterator[None]:
        """cache-dit in our place, on a copy of the model."""
        compiled = self.pipeline.transformer
        if setting.cache_dit is not None:
            self.pipeline.transformer = copy.deepcopy(compiled._orig_mod)
            cache_dit_on(self.pipeline.transformer, setting.cache_dit)
        try:
            yield
        finally:
            self.pipeline.transformer = compiled

    def _counted(self, task: str, setting: Setting) -> tuple[int, int]:
        """FLOPs of a trajectory of one clip as they are executed: (matrix products and convolutions, with attention)."""
        # The counter does not know attention on a CPU.
        known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            self._denoise(task, range(1), setting)
        counts = counter.get_flop_counts()["Global"]
        attention = sum(n for op, n in counts.items() if "attention" in str(op))
        return counter.get_total_flops() - attention, counter.get_total_flops()

    def _latents(self, rgb: Tensor, task: str, numbers: Sequence[int], steps: int | None) -> Tensor:
        result: Tensor = self.pipeline(
            rgb,
            task=task,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(i) for i in numbers],
            output_type="latent",
        ).latents
        return result

    def plan(self, task: str, full: int, apart: bool = False) -> hero_fx.Plan:
        """The calibrated plan with so many full steps."""
        assert self.cache is not None, "plans are kept in the cache"
        key = (task, full, apart)
        if key not in self._plans:
            self._plans[key] = plan_for(self.folder, task, full, self.calibrating, self.cache, apart=apart)
        return self._plans[key]

    def _backend(self, task: str, setting: Setting) -> hero_fx.Backend | None:
        if setting.plan is not None:
            return hero_fx.backend(plan=self.plan(task, setting.plan, setting.apart), inner="eager")
        if setting.options is None:
            return None
        return hero_fx.backend(**{"num_steps": setting.steps or STEPS[task], **setting.options, "inner": "eager"})

    def _trace(self, task: str) -> hero_fx.StepGraphs:
        """The model's graph at the size of a batch of the task."""
        if task not in self._traced:
            self.switch.backend = None
            self._denoise(task, range(self.batch), Setting("one step", steps=1))
            assert self.switch.traced is not None
            self._traced[task] = self.switch.traced
        return self._traced[task]

    def _path(self, task: str, setting: Setting, numbers: range | None) -> Path | None:
        """Where a result is kept: its name holds all that it depends on."""
        if self.cache is None:
            return None
        code = "" if setting.options is None and setting.plan is None else self.code
        of = [self.weights, code, task, GUIDANCE[task], STEPS[task], setting.key, str(numbers or self.batch)]
        if setting.plan is not None:
            of.append(str(self.calibrating))
        if setting.steps is not None:
            of.append(ExactSteps.__name__)
        name = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:24]
        return self.cache / f"{name}.{'json' if numbers is None else 'pt'}"


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of shapes [B, heads, tokens, width]."""
    return int(sdpa_flop_count(query, key, value))


def _own_timestep(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "timestep": kwargs["timestep"].clone()}


def digest(paths: Sequence[Path]) -> str:
    """A hash of the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
