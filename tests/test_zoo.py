"""Every transformer of the zoo: full steps, baselines and HERO against hooks on the modules, one form against the other,
and what AOTAutograd makes of the step graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hero_fx.passes.compat import no_autocast
from hero_fx.passes.rewrite.rows_of_batch import KeepRows
from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.report import Explanation
from hero_fx.step_graphs import copy_graph

from .support.tracing import run_passes
from .support.zoo import FULL, STEPS, backend_for, close, first, found, hooked, trajectory, zoo
from .support.zoo_reference import Hooked, feature_modules

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own

# These break the graph by themselves, without hero_fx: a branch on values of tensors, or sizes that depend on them.
BROKEN = ("hunyuan_video_15", "lumina2", "omnigen", "wan_animate_2", "qwen_image_21", "hidream_image")
# Their graphs differ from another's here in sizes alone: they run where exhaustive tests are asked for, through AOTAutograd.
TWINS = (
    "cogvideox", "cogview3plus", "bria", "longcat_image", "ovis_image", "chronoedit", "qwen_image_edit", "flux_controlnet",
    "sd3_controlled", "sd3_controlnet", "qwen_image_controlled", "qwen_image_controlnet", "hunyuan_dit_controlnet",
    "sana_controlnet", "transformer_2d_patches",
)  # fmt: skip
NAMES = [name for name in zoo.ZOO if name not in BROKEN + TWINS]
WHOLE = [name for name in zoo.ZOO if name not in BROKEN]
# One of each family. All kinds of tests run on these, and on all others where exhaustive tests are asked for.
FAMILIES = (
    "auraflow", "cogvideox_rotary", "cosmos3", "dit", "ernie_image", "flux", "hunyuan_video", "kandinsky6_sr", "latte", "ltx",
    "lumina_next", "mochi", "pixart", "proteina", "qwen_image", "sana", "sd3", "stable_audio", "transformer_2d", "wan", "wan_vace",
)  # fmt: skip


def rows(names: list[str], *more: object, default: Collection[str] = FAMILIES) -> list[Any]:
    """A row for each model, with further arguments; all but `default` are exhaustive."""
    return [pytest.param(name, *more, marks=() if name in default else pytest.mark.exhaustive) for name in names]


# With default options through AOTAutograd: one of each family, and past frames in front of the image, long skip connections, a mixture
# of experts, a T5's decoder, latents in lists. All others go through it in `test_hero`.
DEFAULTS = (*FAMILIES, "helios", "hunyuan_dit", "nucleus_moe", "t5_film", "z_image")
LEAN = ("ernie_image", "flux", "latte", "ltx", "sana", "transformer_2d")


@pytest.mark.parametrize(
    ("name", "policy"),
    [*rows(WHOLE, "hero", default=DEFAULTS), *rows(WHOLE, "lean", default=LEAN)],
)
def test_through_aot_autograd(name: str, policy: str) -> None:
    """Default options: full steps give what the model gives, cached steps what the literal form gives as it is."""
    model = found(name)
    grid = model.sample.grid or model.structure.grid or (1, 1, model.structure.image_tokens)
    patch = tuple(map(min, (1, 2, 3), grid))
    options = {"policy": policy, "refresh_ratio": 1 / 6, "patch": patch, "grid": model.sample.grid}
    ours = trajectory(model, model.stepper(inner="aot_eager", **options)[0])
    close(ours, trajectory(model, model.stepper(form="literal", **options)[0]))
    shares = [step / STEPS for step, full in enumerate(FULL) if full]
    with torch.no_grad():
        theirs = [first(model.sample.model(**model.sample.at(share), return_dict=False)) for share in shares]
    close([out for out, full in zip(ours, FULL, strict=True) if full], theirs, 1e-5)


FEW = ("ltx", "flux", "latte")


@pytest.mark.parametrize(("name", "order"), [*rows(NAMES, 2), *((name, 0) for name in FEW)])
def test_baselines(name: str, order: int) -> None:
    """Full steps are the model's own bit for bit, cached steps what hooks give.

    What order 2 records and puts in the place of each branch holds what order 0 does.
    """
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


# Built like another of the zoo that is here by default, with other options: they run where exhaustive tests are asked for.
RELATIVES = (
    "anyflow", "flux_controlled", "hunyuan_image", "joyimage_edit", "kandinsky6_silent", "prior_shap_e", "sana_video", "skyreels_v2",
)  # fmt: skip
HERO = [
    *rows(NAMES, "extrapolate", default=[name for name in NAMES if name not in RELATIVES]),
    *((name, "reuse") for name in ("flux", "hunyuan_video", "latte", "qwen_image", "sd3", "wan")),
]


@pytest.mark.parametrize(("name", "unsampled"), HERO)
def test_hero(name: str, unsampled: str) -> None:
    """Full steps are the model's own, cached steps what hooks give: modules run on all tokens, of which only the sampled rows
    count."""
    model = found(name)
    shallow, inner = SHALLOW.get(name, 1), "eager" if name in DEFAULTS else "aot_eager"
    options = {"refresh_layers": shallow, "cache_point": "pre_gate", "unsampled": unsampled, "inner": inner}
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
    selections, ours = run.selections, trajectory(model, run)
    if inner == "eager":
        assert all(torch.equal(a, b) for a, b, full in zip(ours, model.plain, FULL, strict=True) if full)
    close(ours, hooked(model, reference, lambda pattern: selections.at(pattern)[0]))


@pytest.mark.parametrize("name", rows(NAMES))
def test_hero_on_all_tokens_is_full_compute(name: str) -> None:
    model = found(name)
    run, _ = model.stepper(policy="hero", refresh_layers=1.0, refresh_ratio=1.0, text="live")
    close(trajectory(model, run), model.plain, 1e-5)


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


@pytest.mark.parametrize("name", rows(["ltx", "flux"], default=["flux"]))
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
    model, backend = found(name), backend_for(found(name).sample, policy="fora")
    assert "varies" in str(Explanation(backend.steps_of(model.source), backend.config))


@pytest.mark.parametrize("name", ["pixart", "allegro", "ltx2", "hunyuan_video"])
def test_half_of_the_batch_is_half_of_the_result(name: str) -> None:
    """Forecasts by halves: masks repeated for heads, batches folded into frames, two streams."""
    model = found(name)
    gm, (whole, *_) = copy_graph(model.normal), model.normal(*model.inputs)
    half = whole.shape[0] // 2
    with no_autocast():
        run_passes(gm, KeepRows(count=half), DropDeadCode())
        for rows in (torch.arange(half), torch.arange(half, 2 * half)):
            close([gm(*model.inputs, rows)[0]], [whole[rows]], 1e-5)
