"""Two processes that share the tokens of one small Wan, and what each of them saw: `python -m tests.support.ranks FOLDER`.

The processes start once; `tests/test_ranks.py` compares what they saw with one process that has all tokens.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes

import hero_fx
from hero_fx.fingerprint import model_config
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Plan, Timeline

from . import ranks_joint, toys
from .quick import collect_seldom, compile_quickly
from .tiny import randomized
from .tracing import Variants

RANKS = 2
GRID = (2, 4, 6)
OWN = 24
"""Tokens of each rank: one frame."""
STEPS = 8
TIMES = tuple(float(t) for t in torch.linspace(999, 19, STEPS).round())
SCHEDULE: dict[str, Any] = {"interval": 3, "warmup": 1, "inner": "eager"}
FULL = (0, 3, 6)
POLICIES: dict[str, dict[str, Any]] = {
    "hero": {**SCHEDULE, "inner": "aot_eager"},
    "sampled keys": {**SCHEDULE, "keys": "sampled", "grid": GRID},
    "fora": {**SCHEDULE, "policy": "fora"},
    "taylorseer": {**SCHEDULE, "policy": "taylorseer"},
    "forecast": {"policy": "forecast", "inner": "eager"},
}
REFUSED: dict[str, dict[str, Any]] = {
    "a budget": {"max_state_bytes": 10**9},
    "scores": {"policy": "toca"},
    "landmarks": {"keys": "landmarks"},
}


@dataclass
class Seen:
    """What one process saw."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """By policy, of each step."""
    full: dict[str, list[bool]] = field(default_factory=dict)
    selections: dict[str, list[Tensor]] = field(default_factory=dict)
    """Sampled tokens of each cached step, among the rank's own."""
    exchanges: dict[str, tuple[int, int]] = field(default_factory=dict)
    """all_to_all in the full and in the cached step graph."""
    grids: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    joint: dict[str, ranks_joint.Run] = field(default_factory=dict)
    """By policy, of a model whose attention is over text and image tokens together."""
    failed: list[str] = field(default_factory=list)
    """The rows of `hero_fx.verify` that do not hold."""


def wan() -> Any:
    torch.manual_seed(0)
    model: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=18,
        freq_dim=16, ffn_dim=36, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return randomized(model)


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    frames, height, width = GRID
    return {
        "hidden_states": torch.randn(2, 4, frames, 2 * height, 2 * width, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 18, generator=generator),
        "return_dict": False,
    }


def plan() -> Plan:
    """A forecast from the last two full steps, with coefficients that nobody fitted."""
    rule = OutputRule(index=0, axis=None, history=2)
    model = hero_fx.Fingerprint(
        name="WanTransformer3DModel", config=model_config(wan()), depth=2, width=24, outputs=((),)
    )
    line = Timeline(
        schedule=tuple(step in FULL for step in range(STEPS)),
        timesteps=TIMES,
        coefficients={rule.table: 0.3 * torch.randn(STEPS, 2, generator=torch.Generator().manual_seed(7))},
    )
    return Plan(policy="forecast", timelines=(line,), outputs=(rule,), model=model)


def backend(name: str) -> hero_fx.Backend:
    more: dict[str, Any] = {"plan": plan()} if name == "forecast" else {}
    return hero_fx.backend(**POLICIES.get(name, SCHEDULE), **more)


def trajectory(
    model: Any, after: Callable[[], None] = lambda: None, named: Any = None, steps: range = range(STEPS)
) -> list[Tensor]:
    """A loop that names its calls; `after`: called after each step; `named`: a `cache_context`, which says no steps."""
    call, outputs = inputs(), []
    with torch.no_grad():
        for step in steps:
            with hero_fx.calling(lane="only", step_index=step) if named is None else named("only"):
                output = model(**call, timestep=torch.full((2,), TIMES[step]))[0]
            outputs.append(output.clone())
            call["hidden_states"] = call["hidden_states"] - output / STEPS
            after()
    return outputs


def run(name: str, call: Any, hero: hero_fx.Backend, seen: Seen) -> None:
    """A trajectory of a compiled model, and what there is to see of it."""

    def after() -> None:
        (stepper,) = hero.steppers
        assert stepper.last is not None
        pattern = [*seen.full.get(name, []), stepper.last.full]
        seen.full[name] = pattern
        if stepper.selections is not None and not stepper.last.full:
            seen.selections.setdefault(name, []).append(stepper.selections.at(tuple(pattern))[0])

    seen.outputs[name] = trajectory(call, after)
    (graphs,) = hero.graphs
    counts = [hero_fx.op_count(gm)["_c10d_functional.all_to_all_single"] for gm in (graphs.full, graphs.cached[0])]
    seen.exchanges[name] = counts[0], counts[1]
    seen.grids[name] = graphs.sampler and graphs.sampler.grid


def of_each_policy(model: Any, seen: Seen) -> None:
    """Dynamo traces the model once, for all that run and all that are refused."""
    refused = {name: hero_fx.backend(inner="eager", **options) for name, options in REFUSED.items()}
    variants = Variants(**{name: backend(name) for name in POLICIES}, **refused)
    call = torch.compile(model, backend=variants, fullgraph=True)
    for name in POLICIES:
        variants.now = name
        run(name, call, variants.backends[name], seen)
    for name in REFUSED:
        variants.now = name
        seen.errors[name] = message(lambda: trajectory(call))
    variants.now = "fora"
    refused_calls(model, call, seen)


def refused_calls(model: Any, fora: Any, seen: Seen) -> None:
    hero_fx.reset()
    with torch.no_grad():
        seen.errors["no names"] = message(lambda: fora(**inputs(), timestep=torch.tensor([9.0, 9.0])))
        # As most pipelines of diffusers do: names alone.
        seen.outputs["names alone"] = trajectory(fora, named=model.cache_context)
        trajectory(fora, named=model.cache_context, steps=range(3))
        seen.errors["cut short"] = message(lambda: trajectory(fora, named=model.cache_context, steps=range(5, 7)))


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


class Summed(torch.nn.Module):
    """A toy whose output all ranks sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.toy()

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        group: Any = dist.group.WORLD
        result: Tensor = all_reduce(self.inner(latents, timestep), "sum", group)
        return result


def refused_at_once(seen: Seen) -> None:
    """What cannot be done with a model of several processes, whichever it is."""
    torch._dynamo.reset()
    model, latents, times = Summed().eval(), toys.latents(), toys.times(STEPS)
    call: Any = torch.compile(model, backend=hero_fx.backend("fora", inner="eager"), fullgraph=True)
    with torch.no_grad(), hero_fx.calling(lane="only", step_index=0):
        call(latents, times[0])
    seen.errors["save"] = message(lambda: hero_fx.save(call, "never.hero"))
    seen.errors["calibrate"] = message(
        lambda: hero_fx.calibrate(
            model, lambda model, scene: toys.loop(model, latents, times)[-1], num_steps=STEPS, budget=2.0, inner="eager"
        )
    )


def sharded(seen: Seen) -> None:
    """FSDP2: the transformer as a whole, and its blocks."""
    mesh = init_device_mesh("cpu", (RANKS,))
    model = wan()
    fully_shard(model, mesh=mesh)
    hero = backend("fsdp")
    run("fsdp", torch.compile(model, backend=hero, fullgraph=True), hero, seen)
    torch._dynamo.reset()
    model = wan()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    call = torch.compile(model, backend=hero_fx.backend(inner="eager"))
    seen.errors["fsdp of blocks"] = message(lambda: trajectory(call))


def joint(seen: Seen) -> None:
    """A model of text and image tokens, and what `hero_fx.verify` says of it."""
    model = ranks_joint.flux()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
    call = {**ranks_joint.inputs(), "timestep": torch.full((2,), 0.9)}
    with torch.no_grad():
        model(**call)
    seen.joint = ranks_joint.run_all(model)
    backend = hero_fx.backend(inner="eager", refresh_layers=0)
    checks = hero_fx.verify(model, backend=backend, show=False, **call).checks
    seen.failed = [str(check) for check in checks if not check.ok]


def of_rank(rank: int, folder: Path) -> None:
    torch.accelerator.device_count = lambda: RANKS  # what diffusers asks; there are none
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    seen, model = Seen(), wan()
    # A timestep of one value for each element of the batch needs no splitting.
    shared = {name: what for name, what in model._cp_plan.items() if name}
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS), cp_plan=shared)
    with torch.no_grad():
        model(
            **inputs(), timestep=torch.tensor([9.0, 9.0])
        )  # the hooks look the model's arguments up at their first call
    of_each_policy(model, seen)
    refused_at_once(seen)
    joint(seen)
    sharded(seen)
    torch.save(vars(seen), folder / f"{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """The ranks are forks of this process, which imports and compiles for the first time, both of which take seconds, once."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    compile_quickly()
    toys.run_toy(toys.toy_backend(), steps=1)
    collect_seldom()
    start: Callable[..., Any] = start_processes
    start(of_rank, args=(folder,), nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
