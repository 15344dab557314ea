"""Every transformer of the zoo: full steps, baselines and HERO against hooks on the modules, one form against the other,
and what AOTAutograd makes of the step graphs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx

import hero_fx
from hero_fx import backends
from hero_fx.backends import Backend
from hero_fx.compiling import compile_step
from hero_fx.config import Config
from hero_fx.passes.compat import argument_name, lazy_code, no_autocast
from hero_fx.passes.rewrite.rows_of_batch import KeepRows
from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.passes.slots import StateSlot, slot_of, slots_of
from hero_fx.policy import Policy
from hero_fx.report import Explanation
from hero_fx.runtime.stepper import CompiledStep, Stepper
from hero_fx.step_graphs import StepGraphs, copy_graph

from .support.examples import example
from .support.tracing import run_passes
from .support.zoo_reference import Hooked, feature_modules

zoo = example("_zoo")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own
STEPS = 7
FULL = [True, True, False, False, True, False, False]

# These break the graph by themselves, without hero_fx: a branch on values of tensors, or sizes that depend on them.
BROKEN = ("hunyuan_video_15", "lumina2", "omnigen", "wan_animate_2", "qwen_image_21", "hidream_image")
# Their graphs differ from another's here in sizes alone: they run once per policy, through AOTAutograd.
TWINS = (
    "cogvideox", "cogview3plus", "bria", "longcat_image", "ovis_image", "chronoedit", "qwen_image_edit", "flux_controlnet",
    "sd3_controlled", "sd3_controlnet", "qwen_image_controlled", "qwen_image_controlnet", "hunyuan_dit_controlnet",
    "sana_controlnet", "transformer_2d_patches",
)  # fmt: skip
NAMES = [name for name in zoo.ZOO if name not in BROKEN + TWINS]
WHOLE = [name for name in zoo.ZOO if name not in BROKEN]


@dataclass
class Found:
    """A model of the zoo, traced once."""

    name: str
    sample: Any
    gm: Any
    inputs: list[Any]
    steps: StepGraphs
    fulls: dict[fx.GraphModule, CompiledStep] = field(default_factory=dict)
    """Full steps that went through AOTAutograd."""

    def stepper(self, **options: Any) -> tuple[Stepper, StepGraphs]:
        """What a backend with other options makes of the traced model.

        AOTAutograd gets no full step that is a part of one it had before: that one runs in its place, and records more.
        """
        backend = _backend(self.sample, **options)
        policy, kept = backend.config.make_policy(), self.fulls if backend.config.inner == "aot_eager" else {}
        assert isinstance(policy, Policy)
        with torch.no_grad(), lazy_code():  # as in Dynamo
            steps = backend.rewrite(self.steps)
            read = {slot for gm in steps.cached for _, slot in slots_of(gm) if isinstance(slot, StateSlot)}
            whole = next((gm for gm in kept if expressions(steps.full) <= expressions(gm)), steps.full)
            assert whole is steps.full or read <= written(steps.full), "a step that records more would hide it"
            steps = replace(steps, full=whole)

            def once(source: fx.GraphModule, gm: fx.GraphModule, config: Config) -> CompiledStep:
                compiled = kept[gm] if gm in kept else compile_step(source, gm, config)
                if gm is whole:
                    kept[gm] = compiled
                return compiled

            timestep = _position(self.gm, self.sample.time)
            with patch.object(backends, "compile_step", once):
                return backend._compile(self.gm, self.inputs, backend.config, policy, steps, timestep), steps

    @cached_property
    def plain(self) -> list[Tensor]:
        """The trajectory of the model itself."""
        return trajectory(self, self.gm)

    def call(self, run: Any, share: float) -> Tensor:
        """The model's first output at a share of the trajectory, by a compiled graph of it."""
        moved = self.sample.at(share)
        values = list(self.inputs)
        for name in (self.sample.time, self.sample.latents):
            value = moved[name]
            values[_position(self.gm, name)] = value[0] if isinstance(value, list) else value
        with torch.no_grad():
            result = run(*values)
        return result[0]  # type: ignore[no-any-return]


def expressions(gm: fx.GraphModule) -> Counter[int]:
    """What a graph computes and writes: each node with all that it is computed from, down to the inputs."""
    known: dict[fx.Node, int] = {}

    def of(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", known[value])
        if isinstance(value, dict):
            return {name: of(item) for name, item in value.items()}
        return [of(item) for item in value] if isinstance(value, tuple | list) else value

    for node in gm.graph.nodes:
        source = node.meta.get("slot", node.name) if node.op == "placeholder" else of((node.args, node.kwargs))
        known[node] = hash((node.op, str(node.target) if node.op != "placeholder" else "", repr(source)))
    return Counter(known.values())


def written(gm: fx.GraphModule) -> set[Any]:
    """The state that a full step writes."""
    writes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {slot for node in writes if (slot := slot_of(node.args[0])) is not None}


def _backend(sample: Any, **options: Any) -> Backend:
    settings: dict[str, Any] = {"inner": "eager", "schedule": FULL, "timestep": sample.time}
    if options["policy"] == "hero":
        settings |= {"refresh_ratio": 0.4, "patch": (1, 1, 2), "grid": sample.grid}
    return hero_fx.backend(**{**settings, **options})


def _position(gm: Any, name: str) -> int:
    names = [argument_name(node) for node in gm.graph.find_nodes(op="placeholder")]
    return names.index(name)


@lru_cache(maxsize=2)
def found(name: str) -> Found:
    """A model of the zoo, traced; `conftest.py` has the tests of one model in a row."""
    sample = zoo.sample(name)
    graphs: list[Any] = []

    def keep(gm: Any, inputs: list[Any]) -> Any:
        steps = _backend(sample, policy="fora").trace(gm, inputs)
        graphs.append((gm, list(inputs), steps))
        return gm.forward

    torch._dynamo.reset()
    model: Any = torch.compile(sample.model, backend=keep, fullgraph=True)
    with torch.no_grad():
        model(**sample.inputs, return_dict=False)
    torch._dynamo.reset()
    ((gm, inputs, steps),) = graphs
    return Found(name, sample, gm, inputs, steps)


def first(value: Any) -> Tensor:
    """The first tensor of a model's output."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def trajectory(model: Found, run: Any) -> list[Tensor]:
    return [first(model.call(run, step / STEPS)) for step in range(STEPS)]


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = float((a - b).abs().max() / b.abs().max())
        assert error < tolerance, f"step {step}: {error}"


def hooked(model: Found, reference: Hooked, rows: Any = None) -> list[Tensor]:
    """The trajectory by hooks; `rows(pattern)` are the sampled tokens of a cached step."""
    outputs, last, before, fulls = [], 0, 0, 0
    for step, full in enumerate(FULL):
        if full:
            before, last = last, step
        inputs = model.sample.at(step / STEPS)
        index = None if full or rows is None else rows(tuple(FULL[: step + 1]))
        out = reference.call(inputs, full=full, x=step - last, d=last - before or 1, fulls=fulls, rows=index)
        fulls += full
        outputs.append(first(out))
    return outputs


@pytest.mark.parametrize("policy", ["hero", "lean"])
@pytest.mark.parametrize("name", WHOLE)
def test_through_aot_autograd(name: str, policy: str) -> None:
    """Default options: full steps give what the model gives, cached steps what the literal form gives as it is."""
    model = found(name)
    grid = model.sample.grid or model.steps.structure.grid or (1, 1, model.steps.structure.image_tokens)
    patch = tuple(map(min, (1, 2, 3), grid))
    options = {"policy": policy, "refresh_ratio": 1 / 6, "patch": patch, "grid": model.sample.grid}
    ours = trajectory(model, model.stepper(inner="aot_eager", **options)[0])
    close(ours, trajectory(model, model.stepper(form="literal", **options)[0]))
    shares = [step / STEPS for step, full in enumerate(FULL) if full]
    with torch.no_grad():
        theirs = [first(model.sample.model(**model.sample.at(share), return_dict=False)) for share in shares]
    close([out for out, full in zip(ours, FULL, strict=True) if full], theirs, 1e-5)


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_baselines(name: str, order: int) -> None:
    """Full steps are the model's own bit for bit, cached steps what hooks give."""
    model = found(name)
    options: dict[str, Any] = {"policy": "taylorseer", "order": order} if order else {"policy": "fora"}
    reference = Hooked(model.sample.model, feature_modules(model.sample.model, name), order)
    ours = trajectory(model, model.stepper(**options)[0])
    assert all(torch.equal(a, b) for a, b, full in zip(ours, model.plain, FULL, strict=True) if full)
    close(ours, hooked(model, reference))


SHALLOW = {"sana_wm": 2}
"""Layers that hero refreshes, if not one; the rest is extrapolated."""

IMAGE_FIRST = (
    "sd3",
    "sd3_5",
    "sd3_controlled",
    "sd3_controlnet",
    "hunyuan_video",
    "hunyuan_image",
    "framepack",
    "motif_video",
    "ernie_image",
    "hidream_image_dense",
    "joyimage_edit",
    "joyimage_edit_plus",
    "nucleus_dense",
    "nucleus_moe",
    "z_image",
)
"""Joint sequences that begin with the image; the others end with it."""
OPTIONS: dict[str, dict[str, Any]] = {
    "flux3": {"behind": 10},
    "bria_fibo2": {"behind": 15},
    "ernie_image": {"token_axis": lambda path: 0 if "mlp" in path else -2},
    "kandinsky6": {"stale": "va_cross_attention"},
    "ltx2": {"stale": "audio_to_video"},
    "framepack": {"past": 56},
    "motif_video": {"stale": "cross_attn"},
    "latte": {"folds": lambda path: 2 if "temporal" in path else 1},
}


def within(modules: set[str]) -> Callable[[str], bool]:
    """Whether a module is one of these, holds one, or is a part of one."""
    return lambda path: any(f"{a}.".startswith(f"{b}.") for m in modules for a, b in ((m, path), (path, m)))


HERO = [
    *((name, "extrapolate") for name in NAMES),
    *((name, "reuse") for name in ("flux", "hunyuan_video", "latte", "qwen_image", "sd3", "wan")),
]


@pytest.mark.parametrize(("name", "unsampled"), HERO)
def test_hero(name: str, unsampled: str) -> None:
    """Against modules that run on all tokens, of which only the sampled rows count."""
    model = found(name)
    shallow = SHALLOW.get(name, 1)
    options = {"refresh_layers": shallow, "cache_point": "pre_gate", "unsampled": unsampled}
    run, steps = model.stepper(policy="hero", **options)
    structure, fallen = steps.structure, {f.branch for f in steps.fallbacks}
    reference = Hooked(
        model.sample.model,
        feature_modules(model.sample.model, name),
        order=1,
        linear=unsampled == "extrapolate",
        shallow=within({b.module for b in structure.branches if b.layer < shallow}),
        full=within({b.module for b in structure.branches if b.label in fallen}),
        image=structure.image_tokens,
        image_first=name in IMAGE_FIRST,
        **OPTIONS.get(name, {}),
    )
    assert run.selections is not None
    selections = run.selections
    close(trajectory(model, run), hooked(model, reference, lambda pattern: selections.at(pattern)[0]))


@pytest.mark.parametrize("name", NAMES)
def test_hero_on_all_tokens_is_full_compute(name: str) -> None:
    model = found(name)
    run, _ = model.stepper(policy="hero", refresh_layers=1.0, refresh_ratio=1.0, text="live")
    close(trajectory(model, run), model.plain, 1e-5)


FEW = ("ltx", "flux", "latte")


@pytest.mark.parametrize("name", FEW)
def test_tokens_chosen_by_score(name: str) -> None:
    """ToCa and DuCa keep full steps as they are; with all tokens chosen, ToCa computes FFNs and reuses attention."""
    model = found(name)
    for policy in ("toca", "duca"):
        ours = trajectory(model, model.stepper(policy=policy, grid=model.sample.grid)[0])
        assert all(torch.equal(a, b) == full for a, b, full in zip(ours, model.plain, FULL, strict=True))
    run, steps = model.stepper(policy="toca", refresh_ratio=1.0, text="live", grid=model.sample.grid)
    ffns = within({branch.module for branch in steps.structure.branches if branch.kind == "ffn"})
    reference = Hooked(model.sample.model, feature_modules(model.sample.model, name), full=ffns)
    close(trajectory(model, run), hooked(model, reference))


@pytest.mark.parametrize("name", ["ltx", "flux"])
def test_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full steps bit for bit, and both forms of a cached one within the dtype's rounding."""
    sample = zoo.sample(name)
    floats = {
        name: value.bfloat16()
        for name, value in sample.inputs.items()
        if isinstance(value, Tensor) and value.dtype == torch.float32 and name != sample.time
    }
    half = replace(sample, model=sample.model.bfloat16(), inputs=sample.inputs | floats)
    monkeypatch.setattr(zoo, "sample", lambda _: half)
    model = found.__wrapped__(name)
    for policy in ("hero", "taylorseer"):
        ours, literal = (trajectory(model, model.stepper(policy=policy, form=f)[0]) for f in ("collapsed", "literal"))
        assert all(torch.equal(a, b) == full for a, b, full in zip(ours, model.plain, FULL, strict=True))
        close(ours, literal, 0.05)


@pytest.mark.parametrize("name", ["mochi"])
def test_explain_where_sizes_depend_on_the_input(name: str) -> None:
    model = found(name)
    assert "varies" in str(Explanation(model.steps, _backend(model.sample, policy="fora").config))


def test_survey(capsys: pytest.CaptureFixture[str]) -> None:
    survey = example("zoo")
    survey.main(["--models", "dit,sana,lumina2", "--json"])
    dit, sana, lumina2 = json.loads(capsys.readouterr().out)
    assert (dit["layers"], dit["branches"], dit["grid"]) == (2, {"attention": 2, "ffn": 2}, [1, 4, 4])
    assert (dit["refreshable"], dit["of"], dit["full_step_error"], dit["fell_back"]) == (4, 4, 0.0, {})
    assert (sana["refreshable"], sana["of"]) == (2, 6)
    assert sana["fell_back"]["aten.unflatten.int: it merges or splits the token axis ([2, 24, 32] -> [2, 4, 6, 32])"] == [
        "l0_ffn", "l1_ffn",
    ]  # fmt: skip
    assert lumina2["plain_fails"]
    text = survey.as_table([dit, sana, lumina2])
    assert "sana: l0_ffn and 1 more: aten.unflatten.int" in text
    assert "lumina2: no single graph, nor without hero_fx: Consider" in text
    assert "(use_mask = len(set(seq_lengths)) > 1  # diffusers/models/transformers/transformer_lumina2.py" in text


def test_survey_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are kept as they are made; those that failed are made again."""
    file = tmp_path / "rows.jsonl"
    failed = {"model": "dit", "policy": "lean", "inner": "eager", "failed": "out of memory", "plain_fails": True}
    file.write_text(json.dumps(failed) + "\n")
    survey = example("zoo")
    arguments = ["--models", "dit", "--inner", "eager", "--output", str(file)]
    survey.main([*arguments, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [failed, *rows] == [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["model"], row["policy"]) for row in rows] == [("dit", "hero"), ("dit", "lean")]
    for row in rows:
        assert (row["graphs"], row["breaks"], row["recompiles"]) == (1, 0, 0)
        assert max(row["full_step_error"], row["cached_step_error"]) < 1e-5
    survey.main(arguments)  # all is there
    assert capsys.readouterr().out.count("\ndit ") == 2
    assert "dit, lean: fails without hero_fx too: out of memory" in survey.as_step_table([failed])


@pytest.mark.parametrize("name", ["pixart", "allegro", "ltx2", "hunyuan_video"])
def test_half_of_the_batch_is_half_of_the_result(name: str) -> None:
    """Forecasts by halves: masks repeated for heads, batches folded into frames, two streams."""
    model = found(name)
    gm, (whole, *_) = copy_graph(model.steps.normal), model.steps.normal(*model.inputs)
    half = whole.shape[0] // 2
    with no_autocast():
        run_passes(gm, KeepRows(count=half), DropDeadCode())
        for rows in (torch.arange(half), torch.arange(half, 2 * half)):
            close([gm(*model.inputs, rows)[0]], [whole[rows]], 1e-5)
