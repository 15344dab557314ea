"""Calibration: plans that come out of it, on toys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx

from .support import tiny, toys
from .support.forecasts import Conditioned
from .support.steps_by_hand import numbers

STEPS = 12


def run(model: Any, i: int) -> Tensor:
    """A trajectory of the toy from noise i."""
    x = toys.latents(seed=100 + i)
    with torch.no_grad():
        for time in toys.times(STEPS):
            x = x - model(x, time) / STEPS
    return x


def calibrated(model: Any = None, **options: Any) -> hero_fx.Calibration:
    known: dict[str, Any] = {"num_steps": STEPS, "budget": 5, "scenes": 2, "holdout": 2, "search": 4, "inner": "eager"}
    return hero_fx.calibrate(model or toys.toy(), options.pop("run", run), **known | options)


def test_a_plan_beats_extrapolated_outputs_at_equal_full_steps() -> None:
    """Those of the last full steps, extrapolated linearly from evenly spaced ones."""
    model = toys.toy()
    found = calibrated(model)
    assert sum(found.plan.timelines[0].schedule) == 5
    full = run(model, 2)
    uniform, table, fulls = tuple(s in (0, 1, 4, 7, 10) for s in range(STEPS)), torch.zeros(STEPS, 5, 1, 1, 1), [0]
    for s, is_full in enumerate(uniform):
        if is_full:
            fulls.append(s)
        else:
            table[s, 1] = (s - fulls[-1]) / (fulls[-1] - fulls[-2])
    line = replace(found.plan.timelines[0], schedule=uniform, coefficients={"out0": table.expand(-1, -1, -1, -1, 6)})
    taylor = replace(found.plan, timelines=(line,))
    backends = {
        "plan": hero_fx.backend(plan=found.plan, inner=tiny.INNER),
        "taylor": hero_fx.backend(plan=taylor, inner=tiny.INNER),
    }
    off = {}
    for name, chosen in backends.items():
        sample = run(toys.torch_compile(model, chosen, fullgraph=True), 2)
        off[name] = float((sample - full).norm() / full.norm())
        assert chosen.stats().full_steps == 5
    assert off["plan"] < off["taylor"]
    # What is reported is what comes out: the mean over the trajectories that were held out.
    other, expected = run(model, 3), found.candidates[0].error["sample"]
    sample = run(toys.torch_compile(model, backends["plan"], fullgraph=True), 3)
    assert (off["plan"] + float((sample - other).norm() / other.norm())) / 2 == pytest.approx(expected, rel=1e-3)


def convolved(model: Any, i: int) -> Tensor:
    """A trajectory of a model that compiles in no time, from noise i."""
    x = numbers(1, 3, 4, 5, seed=100 + i)
    with torch.no_grad():
        for time in toys.times(STEPS, batch=1):
            x = x - model(x, time) / STEPS
    return x


def conv() -> Conditioned:
    return Conditioned().eval().requires_grad_(False)


def test_a_bound_on_the_error_is_kept_with_the_fewest_full_steps(tmp_path: Path) -> None:
    model, bound, runs = conv(), 3e-4, list[int]()

    def counted(model: Any, i: int) -> Tensor:
        runs.append(i)
        return convolved(model, i)

    given: dict[str, Any] = {"max_error": bound, "budget": None, "search": 24, "folder": tmp_path, "run": counted}
    found = calibrated(model, **given)
    (candidate,) = found.candidates
    call = toys.torch_compile(model, hero_fx.backend(plan=found.plan, inner="eager"), fullgraph=True)
    off = [float((convolved(call, i) - (x := convolved(model, i))).norm() / x.norm()) for i in (0, 1)]
    assert sum(off) / 2 <= bound, "run again, on the trajectories that were fitted"
    full = found.plan.timelines[0].full
    fewer = [t.error["sample"] for t in candidate.tried if sum(t.schedule) == full - 1]
    assert fewer
    assert min(fewer) > bound
    for part in ("asked for at most sample 0.0003", f"forecast  {full - 1} ", f"forecast  {full} "):
        assert part in str(found)
    found.plot(tmp_path / "plan.png")
    # What was run is not run again: two fitted and two held out in full, and one call that compiles.
    runs.clear()
    assert str(calibrated(model, **given)) == str(found)
    assert len(runs) == 5


def test_a_bound_that_cannot_be_kept_names_the_nearest() -> None:
    for given, message in (
        (1e-12, r"with 11 full steps, .*, sample is \S+ and may be 1e-12; raise max_error"),
        ({"rgb": 0.1}, r"max_error=\{'rgb': 0.1\}: 'rgb' is not measured; distances are 'sample'"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrated(conv(), max_error=given, budget=None, search=1, run=convolved)


def test_the_same_seed_gives_the_same_plan(tmp_path: Path) -> None:
    first, again = (calibrated(conv(), run=convolved, folder=tmp_path / name) for name in "ab")
    assert first.plan.timelines[0].schedule == again.plan.timelines[0].schedule
    assert torch.equal(first.plan.timelines[0].coefficients["out0"], again.plan.timelines[0].coefficients["out0"])
    assert str(first) == str(again)


@pytest.mark.exhaustive
@pytest.mark.parametrize("policy", ["hero", "taylorseer", "lean"])
def test_features_of_four_layers_are_calibrated(policy: str) -> None:
    (candidate,) = calibrated(toys.toy(layers=4), policies=(policy,), budget=6).candidates
    assert candidate.policy == policy
    assert 0 < candidate.error["sample"] < 0.1
    assert all(table.shape[2:] == (toys.WIDTH,) for table in candidate.plan.timelines[0].coefficients.values())


def test_candidates_are_compared_and_shown(tmp_path: Path) -> None:
    """Outputs and features: every policy that there are plans for."""
    policies = ("forecast", "hero", "taylorseer", "lean")
    found = calibrated(toys.toy(), policies=policies, budget=1.5, search=2)
    assert {c.policy for c in found.candidates} == set(policies)
    assert [c.score for c in found.candidates] == sorted(c.score for c in found.candidates)
    for candidate in found.candidates:
        assert candidate.speed >= 1.5
        assert 0 < candidate.error["sample"] < 0.1
        tables = candidate.plan.timelines[0].coefficients.values()
        assert candidate.policy == "forecast" or all(table.shape[2:] == (toys.WIDTH,) for table in tables)
    for part in (*policies, "sample", "█"):
        assert part in str(found)
    found.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_saved_plan_is_followed(tmp_path: Path) -> None:
    model, path = conv(), tmp_path / "plan.safetensors"
    found = calibrated(model, run=convolved, full_steps=(7,))
    found.plan.save(path)
    assert found.plan.timelines[0].schedule[7]
    samples = [
        convolved(toys.torch_compile(model, hero_fx.backend(plan=plan, inner="eager"), fullgraph=True), 5)
        for plan in (found.plan, path)
    ]
    assert torch.equal(*samples)


def test_steps_must_be_as_many_as_said() -> None:
    with pytest.raises(ValueError, match=r"num_steps=9, but run\(model, 0\) made 12 steps"):
        calibrated(num_steps=9)


def test_a_run_that_leaves_the_model_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="did not call the model"):
        calibrated(run=lambda model, i: numbers(2, 3, seed=i))


def test_few_steps_are_said_to_gain_little(caplog: pytest.LogCaptureFixture) -> None:
    def short(model: Any, i: int) -> Tensor:
        x = numbers(1, 3, 4, 5, seed=i)
        for time in toys.times(4, batch=1):
            x = x - model(x, time) / 4
        return x

    found = calibrated(conv(), num_steps=4, budget=3, run=short)
    assert "num_steps=4: with so few steps" in caplog.text
    assert "note: num_steps=4: with so few steps" in str(found)


def test_without_a_latent_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Packed(torch.nn.Module):
        """Its output has another shape than its input."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = toys.toy()

        def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
            out: Tensor = self.inner(latents, timestep)
            return out.flatten(1)

    def unpacked(model: Any, i: int) -> Tensor:
        return run(lambda x, time: model(x, time).unflatten(1, x.shape[1:]), i)

    found = calibrated(Packed().eval().requires_grad_(False), run=unpacked)
    assert found.plan.outputs[0].latent is None
    assert "past outputs alone" in caplog.text


def test_conditioning_channels_are_told_from_the_latent() -> None:
    """They stay from step to step; that they differ from trajectory to trajectory makes them no latent."""

    class Told(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toys.toy()

        def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
            out: Tensor = self.inner(latents[..., 2 : 2 + toys.CHANNELS] + latents[..., :1], timestep)
            return out

    def told(model: Any, i: int) -> Tensor:
        hint = numbers(2, toys.TOKENS, 3, seed=i)
        return run(lambda x, time: model(torch.cat([hint[..., :2], x, hint[..., 2:]], dim=2), time), i)

    (rule,) = calibrated(Told().eval().requires_grad_(False), run=told).plan.outputs
    assert (rule.latent, rule.start, rule.axis) == ("latents", 2, 2)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_steps": 1}, "num_steps=1"),
    ({"budget": 0.5}, "budget=0.5"),
    ({"budget": 13}, "budget=13 full steps, but num_steps=12"),
    ({"budget": "fast"}, "budget='fast'"),
    ({"budget": None}, "budget=None and max_error=None: give one of them"),
    ({"max_error": 0.1}, "budget=5 and max_error=0.1: give one of them"),
    ({"budget": None, "max_error": 0}, "max_error=0 must be a number above 0"),
    ({"budget": None, "max_error": {}}, "max_error={} must be"),
    ({"scenes": 0}, "scenes=0"),
    ({"scenes": [1, 1]}, "different numbers"),
    ({"scenes": [1, 2], "holdout": [2]}, "holdout=.* tell nothing"),
    ({"policies": ("toca",)}, "policies=.*choose from 'forecast'"),
    ({"policies": "hero"}, "in a tuple or list"),
    ({"search": 0}, "search=0"),
    ({"full_steps": (12,)}, "full_steps=.*from 0 to 11"),
    ({"history": 4}, "history=4"),
    ({"by": ("channels",)}, "by=.*'frames', 'batch'"),
    ({"samples": 0}, "samples=0"),
    ({"closed_loop": -1}, "closed_loop=-1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_arguments_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated(**options)
