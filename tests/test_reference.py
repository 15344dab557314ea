"""The eager reference checked against the model it copies, and against small cases worked out by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from .reference import Config, Reference, trajectory
from .reference_parts import differences, drift
from .support.reference_model import BATCH, GRID, IMAGE, LAYERS, TEXT, cached, close, full, inputs, model_of, sample

CACHE_POINTS = [("pre_gate", "pre_gate"), ("pre_gate", "post_gate"), ("post_gate", "post_gate")]


@pytest.fixture(scope="module", params=[False, True], ids=["sincos", "rotary"])
def rotary(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def model(rotary: bool) -> Any:
    return model_of(rotary)


# ---------------------------------------------------------------------------------------------------- full steps
@pytest.mark.parametrize("policy", ["full", "fora", "taylorseer", "hero", "toca", "duca"])
@pytest.mark.parametrize("cache_point", CACHE_POINTS)
def test_full_step_is_the_model_bit_for_bit(
    model: Any, rotary: bool, policy: str, cache_point: tuple[str, str]
) -> None:
    config = Config(policy=policy, refresh_layers=2, grid=GRID, cache_point=cache_point)
    reference = Reference(model, config)
    for step in (0, 1):
        kwargs = inputs(rotary, step)
        expected = model(**kwargs, return_dict=False)[0]
        assert torch.equal(full(reference, kwargs, d=1, fulls=step), expected)


def test_policy_full_computes_cached_steps_too(model: Any, rotary: bool) -> None:
    kwargs = inputs(rotary, 0)
    output = cached(Reference(model, Config(policy="full")), kwargs, x=1)
    assert torch.equal(output, model(**kwargs, return_dict=False)[0])


# --------------------------------------------------------------------------------------------- fora, taylorseer
@pytest.mark.parametrize("cache_point", CACHE_POINTS)
def test_fora_on_the_same_inputs_is_the_full_output(model: Any, rotary: bool, cache_point: tuple[str, str]) -> None:
    reference = Reference(model, Config(policy="fora", cache_point=cache_point))
    kwargs = inputs(rotary, 0)
    expected = full(reference, kwargs)
    assert torch.equal(cached(reference, kwargs, x=1), expected)
    assert not torch.equal(cached(reference, inputs(rotary, 1), x=2), expected)


def test_differences_predict_a_line_and_start_at_zero() -> None:
    a, b = torch.randn(2, 3, 5, dtype=torch.float64)

    def line(t: int) -> Tensor:
        return torch.add(a, b, alpha=t)

    y = differences(line(2), [], 2, 0, 0)
    assert torch.equal(y[0] + drift(y, 4), line(2))
    y = differences(line(5), y, 2, 3, 1)
    torch.testing.assert_close(y[0] + drift(y, 4), line(9))
    y = differences(line(7), y, 2, 2, 2)
    torch.testing.assert_close(y[0] + drift(y, 3), line(10))


def test_second_difference_is_halved_square() -> None:
    y: list[Tensor] = []
    for fulls, t in enumerate((0, 2, 4)):
        y = differences(torch.tensor(float(t * t)), y, 2, 2, fulls)
    # Y1: (16 - 4) / 2 = 6, before it (4 - 0) / 2 = 2; Y2: (6 - 2) / 2 = 2
    assert [float(term) for term in y] == [16, 6, 2]
    assert float(drift(y, 3)) == 6 * 3 + 2 * 9 / 2


@pytest.mark.parametrize("cache_point", CACHE_POINTS)
def test_taylorseer_and_deep_hero_are_equation_6(model: Any, rotary: bool, cache_point: tuple[str, str]) -> None:
    configs = [
        Config(policy="taylorseer", cache_point=cache_point),
        Config(policy="hero", refresh_layers=0, cache_point=cache_point),
    ]
    taylor, hero = [Reference(model, config) for config in configs]
    before: dict[tuple[int, str], Tensor] = {}
    for fulls, step in enumerate((0, 3)):
        before = {key: y[0] for key, y in taylor.y.items()}
        for reference in (taylor, hero):
            full(reference, inputs(rotary, step), d=3, fulls=fulls)
    fora = Reference(model, Config(policy="fora", cache_point=cache_point))
    fora.y = {key: [y[0] + 2 / 3 * (y[0] - before[key])] for key, y in taylor.y.items()}
    kwargs = inputs(rotary, 5)
    expected = cached(fora, kwargs, x=2)
    close(cached(taylor, kwargs, x=2), expected)
    assert torch.equal(cached(taylor, kwargs, x=2), cached(hero, kwargs, x=2))


# --------------------------------------------------------------------------------------------------------- hero
HERO = [
    {"keys": keys, "cache_point": cache_point, "unsampled": unsampled}
    for keys, cache_point, unsampled in product(
        ["sampled", "sampled+text", "all"], CACHE_POINTS, ["reuse", "extrapolate"]
    )
]


@pytest.mark.parametrize("options", HERO, ids=lambda options: "-".join(map(str, options.values())))
def test_refreshing_every_token_is_a_full_step(model: Any, rotary: bool, options: dict[str, Any]) -> None:
    reference = Reference(model, Config(policy="hero", refresh_layers=LAYERS, text="live", **options))
    full(reference, inputs(rotary, 0))
    full(reference, inputs(rotary, 1), d=1, fulls=1)
    for step in (2, 3):
        kwargs = inputs(rotary, step)
        close(cached(reference, kwargs, step - 1, sample(IMAGE)), model(**kwargs, return_dict=False)[0])


@pytest.mark.parametrize("text", ["skip", "live"])
@pytest.mark.parametrize("unsampled", ["reuse", "extrapolate"])
def test_refreshing_on_unchanged_inputs_changes_nothing(model: Any, rotary: bool, text: str, unsampled: str) -> None:
    config = Config(policy="hero", refresh_layers=2, keys="all", text=text, unsampled=unsampled)
    reference = Reference(model, config)
    kwargs = inputs(rotary, 0)
    expected = full(reference, kwargs)
    close(cached(reference, kwargs, 1, sample(8)), expected)
    close(cached(reference, kwargs, 2, sample(8, seed=6)), expected)


@pytest.mark.parametrize("cache_point", CACHE_POINTS)
def test_sampled_keys_run_the_model_on_the_sampled_tokens(
    model: Any, rotary: bool, cache_point: tuple[str, str]
) -> None:
    config = Config(policy="hero", refresh_layers=LAYERS, keys="sampled", text="live", cache_point=cache_point)
    reference, idx, kwargs = Reference(model, config), sample(11), inputs(rotary, 1)
    full(reference, inputs(rotary, 0))
    output = cached(reference, kwargs, 1, idx)

    emb = model.time_embedding(model.time_proj(kwargs["timestep"]))
    tokens = model.patch_embed(kwargs["encoder_hidden_states"], kwargs["hidden_states"])
    text, image = tokens[:, :TEXT], tokens[:, TEXT:][:, idx]
    tables = tuple(table[idx] for table in kwargs["image_rotary_emb"]) if rotary else None
    for block in model.transformer_blocks:
        image, text = block(image, text, emb, tables)
    expected = model.proj_out(model.norm_out(model.norm_final(image), temb=emb))

    patches = output.unflatten(4, (5, 2)).unflatten(3, (3, 2)).permute(0, 1, 3, 5, 2, 4, 6)
    close(patches.flatten(4).flatten(1, 3)[:, idx], expected)


@pytest.mark.parametrize("text", ["skip", "live"])
@pytest.mark.parametrize("keys", ["sampled", "sampled+text", "all"])
@pytest.mark.parametrize("unsampled", ["reuse", "extrapolate"])
def test_only_refreshed_rows_of_the_state_change(
    model: Any, rotary: bool, keys: str, text: str, unsampled: str
) -> None:
    config = Config(policy="hero", refresh_layers=2, keys=keys, text=text, unsampled=unsampled)
    reference, idx, x = Reference(model, config), sample(8), 2
    full(reference, inputs(rotary, 0))
    full(reference, inputs(rotary, 3), d=3, fulls=1)
    y, keys_values = dict(reference.y), dict(reference.keys_values)
    cached(reference, inputs(rotary, 5), x, idx)

    refreshed = torch.zeros(TEXT + IMAGE, dtype=torch.bool)
    refreshed[TEXT + idx] = True
    refreshed[:TEXT] = text == "live"
    for (layer, branch), before in y.items():
        after = reference.y[layer, branch]
        assert len(after) == (2 if layer == 2 or unsampled == "extrapolate" else 1)
        assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))
        changed = (after[0] != before[0]).any(dim=2)
        assert torch.equal(changed, (refreshed & (layer < 2)).expand(BATCH, -1))
    assert sorted(keys_values) == [0, 1]
    for layer, old in keys_values.items():
        for a, b in zip(reference.keys_values[layer], old, strict=True):
            changed = (a != b).any(dim=3).any(dim=1)
            assert torch.equal(changed, (refreshed & (keys == "all")).expand(BATCH, -1))


@pytest.mark.parametrize("keys", ["sampled+text", "all"])
def test_cached_text_keys_are_those_of_unchanged_text(model: Any, rotary: bool, keys: str) -> None:
    """Same text and timestep: layer 0 has the same text K and V, so live text changes nothing for the image."""
    before = inputs(rotary, 0)
    now = before | {"hidden_states": inputs(rotary, 1)["hidden_states"]}
    features = []
    for text in ("skip", "live"):
        reference = Reference(model, Config(policy="hero", refresh_layers=1, keys=keys, text=text))
        full(reference, before)
        cached(reference, now, 1, sample(8))
        features.append(reference.y[0, "attn"][0][:, TEXT:])
    close(features[0], features[1])


def test_all_keys_are_those_of_the_current_tokens_if_the_others_are_unchanged(model: Any, rotary: bool) -> None:
    """Latents that changed under the sampled tokens alone: in layer 0 these get the features of a full step."""
    idx, before = sample(8), inputs(rotary, 0)
    tokens = torch.zeros(IMAGE, dtype=torch.bool).index_fill(0, idx, True)
    changed = tokens.view(3, 1, 3, 5).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    latents = torch.where(changed, inputs(rotary, 1)["hidden_states"], before["hidden_states"])
    reference = Reference(model, Config(policy="hero", refresh_layers=1, keys="all"))
    full(reference, before)
    cached(reference, before | {"hidden_states": latents}, 1, idx)
    refreshed = reference.y[0, "attn"][0][:, TEXT + idx]
    full(reference, before | {"hidden_states": latents})
    close(refreshed, reference.y[0, "attn"][0][:, TEXT + idx])


def test_extrapolated_state_passes_through_the_fresh_features(model: Any, rotary: bool) -> None:
    x, idx, lists = 2, sample(8), []
    for unsampled in ("reuse", "extrapolate"):
        reference = Reference(model, Config(policy="hero", refresh_layers=1, unsampled=unsampled))
        full(reference, inputs(rotary, 0))
        full(reference, inputs(rotary, 3), d=3, fulls=1)
        cached(reference, inputs(rotary, 5), x, idx)
        lists.append([term[:, TEXT + idx] for term in reference.y[0, "attn"]])
    (fresh,), (base, slope) = lists
    close(base + x * slope, fresh)
    assert not torch.allclose(base, fresh, atol=1e-3)


@pytest.mark.parametrize(
    ("policy", "points"),
    [("fora", "ddd"), ("taylorseer", "ddd"), ("hero", "ssd"), ("toca", "sss"), ("duca", "sss")],
)
def test_cache_point_of_each_layer(model: Any, policy: str, points: str) -> None:
    options: dict[str, Any] = {"policy": policy, "refresh_layers": 2, "grid": GRID}
    reference = Reference(model, Config(cache_point=("pre_gate", "post_gate"), **options))
    names = {"s": "pre_gate", "d": "post_gate"}
    assert [reference._cache_point(layer) for layer in range(LAYERS)] == [names[point] for point in points]


# --------------------------------------------------------------------------------------------------- trajectory
def test_trajectory_counts_steps(model: Any, rotary: bool) -> None:
    config = Config(policy="hero", refresh_layers=1, order=2, unsampled="extrapolate")
    calls: list[tuple[int, int]] = []

    def indices(step: int, layer: int) -> Tensor:
        calls.append((step, layer))
        return sample(8, seed=step)

    mask = [True, True, False, False, True, False]
    outputs = list(trajectory(model, config, mask, indices, lambda step: inputs(rotary, step)))
    assert calls == [(2, 0)] * 2 + [(3, 0)] * 2 + [(5, 0)] * 2  # attention and FFN of layer 0

    reference, expected = Reference(model, config), []
    expected.append(full(reference, inputs(rotary, 0)))
    expected.append(full(reference, inputs(rotary, 1), d=1, fulls=1))
    expected.append(cached(reference, inputs(rotary, 2), 1, sample(8, seed=2)))
    expected.append(cached(reference, inputs(rotary, 3), 2, sample(8, seed=3)))
    expected.append(full(reference, inputs(rotary, 4), d=3, fulls=2))
    expected.append(cached(reference, inputs(rotary, 5), 1, sample(8, seed=5)))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


# ------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("policy", "heroic"), ("keys", "text"), ("text", "fresh"), ("unsampled", "zero"), ("cache_point", ("pre_gate", "gate")),
        ("cache_point", "pre_gate"), ("order", -1), ("ratio", 0.0), ("ratio", 1.5), ("interval", 0), ("refresh_layers", None),
        ("refresh_layers", -1),
    ],
)  # fmt: skip
def test_bad_config_is_refused(argument: str, value: Any) -> None:
    options: dict[str, Any] = {"policy": "hero", "refresh_layers": 1, argument: value}
    with pytest.raises(ValueError, match=argument):
        Config(**options)


def test_bad_grid_is_refused(model: Any, rotary: bool) -> None:
    with pytest.raises(ValueError, match="grid"):
        Config(policy="toca")
    reference = Reference(model, Config(policy="duca", grid=(3, 3, 4)))
    full(reference, inputs(rotary, 0))
    with pytest.raises(ValueError, match="grid"):
        cached(reference, inputs(rotary, 1), 1)


def test_bad_calls_are_refused(model: Any, rotary: bool) -> None:
    with pytest.raises(ValueError, match="refresh_layers"):
        Reference(model, Config(policy="hero", refresh_layers=LAYERS + 1))
    reference, kwargs = Reference(model, Config(policy="hero", refresh_layers=1)), inputs(rotary, 0)
    with pytest.raises(ValueError, match="no full step"):
        cached(reference, kwargs, 1, sample(8))
    full(reference, kwargs)
    for idx in (torch.tensor([1, 1]), torch.tensor([-1, 2]), torch.tensor([IMAGE]), None):
        with pytest.raises(ValueError, match="indices"):
            cached(reference, kwargs, 1, idx)
    reference.reset()
    with pytest.raises(ValueError, match="no full step"):
        cached(reference, kwargs, 1, sample(8))
    with pytest.raises(ValueError, match="mask"):
        next(trajectory(model, Config(policy="fora"), [False], None, lambda step: kwargs))
