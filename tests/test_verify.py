"""`hero_fx.verify`: sound models hold, each defect shows, and nothing of the user's is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import hero_fx
from hero_fx import build as steps
from hero_fx.passes.analysis import branches, memory
from hero_fx.passes.normalize import trace as normalize
from hero_fx.passes.normalize.autocast import ResolveAutocast
from hero_fx.passes.rewrite.outputs import OwnOutputs
from hero_fx.passes.simplify import scatters as collapse
from hero_fx.runtime import weights
from hero_fx.verification.example import by_name, times_from, twin_of
from hero_fx.verification.trial import Trial

from .support import defects, tiny, toys

TIME = torch.tensor([999, 999])
aten = torch.ops.aten


def failed(result: hero_fx.Verification) -> set[str]:
    return {check.name for check in result.checks if not check.ok}


def verified(model: Any, *, time: Tensor = TIME, **options: Any) -> hero_fx.Verification:
    options = {"inner": tiny.INNER, "grid": toys.GRID} | options
    return hero_fx.verify(model, toys.latents(), time, backend=hero_fx.backend(**options), show=False)


POLICIES: dict[str, dict[str, Any]] = {
    "hero": {"inner": "aot_eager"},
    "paper": {"unsampled": "reuse", "keys": "sampled", "selection": "per_layer"},
    "lean": {"policy": "lean", "order": 2},
    "bytes": {"policy": "taylorseer", "grid": None, "state_dtype": torch.int8},
    "bytes of all": {"state_dtype": torch.int8},
    "literal": {"form": "literal", "interval": 4},
    "toca": {"policy": "toca", "text": "live", "inner": "aot_eager"},
    "duca": {"policy": "duca", "interval": 3},
}


FURTHER = ("literal", "paper", "lean", "duca", "bytes of all")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=pytest.mark.exhaustive if name in FURTHER else ())
        for name, options in POLICIES.items()
    ],
)
def test_a_sound_model_holds(options: dict[str, Any]) -> None:
    assert failed(verified(toys.toy(), **options)) == set()


@pytest.mark.exhaustive
@pytest.mark.parametrize("keys", ["landmarks"])
def test_a_published_model_holds(keys: Any) -> None:
    model, call = tiny.cogvideox(layers=2), tiny.inputs()
    backend = hero_fx.backend(inner=tiny.INNER, keys=keys)
    result = hero_fx.verify(model, **call, timestep=TIME, return_dict=False, backend=backend, show=False)
    assert failed(result) == set()


def test_half_precision_holds() -> None:
    model = toys.toy().bfloat16()
    backend = hero_fx.backend(inner=tiny.INNER, grid=toys.GRID)
    result = hero_fx.verify(model, toys.latents().bfloat16(), TIME, backend=backend, show=False)
    assert failed(result) == set()
    assert {check.tolerance for check in result.checks} == {0.0, 3e-2}


def old_labels(patch: pytest.MonkeyPatch) -> None:
    """Labels that are unique among the last eight alone; nothing asserts that state is one branch's own."""

    class Labels:
        def __init__(self) -> None:
            self.made: list[tuple[int, str]] = []

        def next(self, layer: int, kind: str) -> str:
            label = f"l{layer}_{kind}"
            if label in [made for _, made in self.made[-8:]]:
                label = f"{label}_{sum(at == layer for at, _ in self.made)}"
            self.made.append((layer, label))
            return label

        def check(self) -> None:
            pass

    patch.setattr(branches, "Labels", Labels)


def blind_to_writes(patch: pytest.MonkeyPatch) -> None:
    """Nothing is known of memory that is written to."""
    patch.setattr(memory.Memory, "version", lambda self, *at, **more: 0)
    patch.setattr(memory.Memory, "written", lambda self, *at, **more: False)


def any_index(patch: pytest.MonkeyPatch) -> None:
    """Every index counts as a selection, on whatever axis."""
    patch.setattr(collapse, "is_selection", lambda index: True)
    patch.setattr(collapse, "is_scatter", lambda n: isinstance(n, fx.Node) and n.target is aten.index_copy.default)


def outputs_as_they_are(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OwnOutputs, "apply", lambda self, gm: 0)
    patch.setattr(steps, "check_state", lambda graphs: None)


def regions_as_they_are(patch: pytest.MonkeyPatch) -> None:
    """Autocast stays calls in the graph, which the passes do not know."""
    patch.setattr(ResolveAutocast, "apply", lambda self, gm: 0)
    patch.setattr(normalize._Traced, "call_function", fx.Interpreter.call_function)


def one_model(patch: pytest.MonkeyPatch) -> None:
    """State is the code's: whatever weights come, they are those of the first model."""
    known: dict[int, Any] = {}
    told = weights.Weights.model

    def first(self: Any, inputs: Any) -> Any:
        return known.setdefault(id(self), told(self, inputs))

    patch.setattr(weights.Weights, "model", first)


DEFECTS: dict[str, tuple[type[defects.Small], str, dict[str, Any], Callable[[pytest.MonkeyPatch], None]]] = {
    "label": (defects.ManyMLPs, "constant trajectory", {"policy": "fora", "grid": None}, old_labels),
    "write": (defects.WritesBetweenReads, "collapsed form", {}, blind_to_writes),
    "negative": (defects.GathersBackwards, "collapsed form", {}, any_index),
    "repeats": (defects.GathersRepeats, "collapsed form", {}, any_index),
    "alias": (defects.ReturnsUpdate, "kept outputs", {"policy": "fora", "grid": None}, outputs_as_they_are),
    "autocast": (defects.AutocastInside, "matrix products", {}, regions_as_they_are),
    "region": (defects.AutocastAround, "steps", {}, regions_as_they_are),
    "twin": (defects.Small, "two models, one backend", {"policy": "fora", "grid": None}, one_model),
}
# As they are, these hold as others here do; that the steps of "label" and "repeats" are right is what test_legality.py tests.
ALIKE = ("label", "negative", "repeats", "autocast", "region", "twin")
FOUND = [
    pytest.param(
        *row, put_back,
        id=f"{name}-{'defect put back' if put_back else 'as it is'}",
        marks=pytest.mark.exhaustive if name in ALIKE and not put_back else (),
    )
    for name, row in DEFECTS.items()
    for put_back in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "check", "options", "defect", "put_back"), FOUND)
def test_it_finds_the_defect(
    kind: type[defects.Small],
    check: str,
    options: dict[str, Any],
    defect: Callable[[pytest.MonkeyPatch], None],
    put_back: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if put_back:
        defect(monkeypatch)
    found = failed(verified(defects.seeded(kind), **options))
    assert check in found if put_back else not found


def test_weights_of_another_dtype_under_autocast() -> None:
    model = defects.seeded(defects.AutocastInside)
    model.attention.bfloat16()
    model.mlps.bfloat16()
    assert failed(verified(model)) == set()


def test_the_loop_around_goes_on_as_if_nothing_had_been() -> None:
    model, backend = toys.compiled(policy="taylorseer", grid=None)
    times = toys.times(8)
    undisturbed = toys.loop(model, toys.latents(), times)
    backend.reset()
    before, names = backend.stats(), set(vars(model._orig_mod))

    def call(x: Tensor, time: Tensor) -> Tensor:
        if time is times[4]:
            assert failed(hero_fx.verify(model, x, time, show=False)) == set()
        result: Tensor = model(x, time)
        return result

    outputs = toys.loop(call, toys.latents(), times)
    assert toys.same(outputs, undisturbed)
    after = backend.stats()
    assert (after.graphs, after.full_steps + after.cached_steps) == (1, before.full_steps + before.cached_steps + 8)
    assert after.sessions == 1
    assert set(vars(model._orig_mod)) == names
    toys.alone(model, backend, toys.latents(), times[:1])  # fails on a recompile


def test_buffers_that_the_model_writes_get_their_values_back() -> None:
    model = defects.seeded(defects.WritesBetweenReads)
    before = model.memory.clone()
    verified(model, policy="fora", grid=None)
    assert torch.equal(model.memory, before)


def test_it_takes_the_options_that_a_model_was_compiled_with(capsys: pytest.CaptureFixture[str]) -> None:
    model = toys.toy()
    model.compile(backend=hero_fx.backend("fora", inner=tiny.INNER))
    result = hero_fx.verify(model, toys.latents(), timestep=TIME)
    assert "refresh of all tokens" not in {check.name for check in result.checks}
    assert capsys.readouterr().out == f"{result}\n"
    function = toys.torch_compile(
        lambda latents, timestep: model(latents, timestep), hero_fx.backend("fora", inner=tiny.INNER)
    )
    names = [check.name for check in hero_fx.verify(function, toys.latents(), TIME, show=False).checks]
    assert "refresh of all tokens" not in names
    assert "two models, one backend" not in names, "a function has no weights to make a second one of"


def test_the_table() -> None:
    checks = (
        hero_fx.Check("repeat", "first run", 0.0, 0.0),
        hero_fx.Check("steps", "the schedule", float("inf"), 0.0, "E: no"),
    )
    result = hero_fx.Verification(checks)
    assert not result.ok
    assert hero_fx.Verification(checks[:1]).ok
    assert str(result).splitlines() == [
        "check    compared      error    tolerance    holds",
        "-------  ------------  -------  -----------  -------",
        "repeat   first run     0.0e+00  0            yes",
        "steps    the schedule  inf      0            NO",
        "steps: E: no",
        "1 of 2 do not hold: steps",
    ]


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="policy='full' rewrites nothing"):
        verified(toys.toy(), policy="full", grid=None)
    with pytest.raises(hero_fx.UnsupportedModel, match="training mode"):
        verified(toys.toy().train())
    with pytest.raises(hero_fx.UnsupportedModel, match="no attention or FFN branch"):
        hero_fx.verify(nn.Linear(2, 2).eval(), torch.ones(1, 3, 2), backend=hero_fx.backend(strict=False), show=False)


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (torch.tensor(999), [999, 950, 901]),
        (torch.tensor([3]), [[3], [2], [1]]),
        (torch.tensor([1]), [[1], [2], [3]]),
        (torch.tensor(0), [0, 1, 2]),
        (torch.tensor(0.0), [0.0, 0.05, 0.1]),
        (torch.tensor([[0.0, 0.5]]), [[[0.0, 0.5]], [[0.0, 0.475]], [[0.0, 0.45]]]),
        (torch.tensor([[0, 40]]), [[[0, 40]], [[0, 38]], [[0, 36]]]),
    ],
)
def test_timesteps_of_any_form_travel(example: Tensor, expected: list[Any]) -> None:
    times = times_from(example, 3)
    assert {(t.dtype, t.shape) for t in times} == {(example.dtype, example.shape)}
    for time, values in zip(times, expected, strict=True):
        torch.testing.assert_close(time, torch.tensor(values, dtype=example.dtype))


def test_half_precision_timesteps_are_told_apart() -> None:
    assert len({float(t) for t in times_from(torch.tensor(999.0, dtype=torch.bfloat16), 12)}) == 12


def test_latents_move_and_conditions_are_the_same_objects() -> None:
    call = tiny.inputs()
    config = hero_fx.Config(policy="fora", inner=tiny.INNER)
    model, named = tiny.cogvideox(layers=2), {**call, "timestep": TIME, "return_dict": False}
    latents = named.pop("hidden_states")
    example = Trial(model, by_name(model, (latents,), named), config).example
    assert [x is call["hidden_states"] for x in example.latents] == [True]
    calls = example.trajectory(3, seed=0)
    assert all(c.kwargs["encoder_hidden_states"] is call["encoder_hidden_states"] for c in calls)
    assert all(c.kwargs["image_rotary_emb"][0] is call["image_rotary_emb"][0] for c in calls)
    assert not torch.equal(calls[0].kwargs["hidden_states"], calls[1].kwargs["hidden_states"])
    again = example.trajectory(3, seed=0)
    assert torch.equal(again[2].kwargs["hidden_states"], calls[2].kwargs["hidden_states"])


def test_the_second_model_shares_all_weights_but_one() -> None:
    model = tiny.cogvideox(layers=2)
    weight = model.patch_embed.proj.bias
    twin = twin_of(model, weight)
    assert twin is not None
    own = {name for name, p in twin.named_parameters() if p is not model.get_parameter(name)}
    assert own == {"patch_embed.proj.bias"}
    assert not torch.equal(twin.get_parameter("patch_embed.proj.bias"), weight)
    assert twin.transformer_blocks is model.transformer_blocks
