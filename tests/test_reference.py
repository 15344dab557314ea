"""The eager reference checked against the model it copies, and against small cases worked out by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor
from torch.nn import functional

from .reference import Config, Reference, trajectory
from .reference_parts import attention_received, cell_bonus, differences, drift, value_smallness

BATCH, TEXT, LAYERS, GRID = 2, 7, 3, (3, 3, 5)
IMAGE = 3 * 3 * 5
CACHE_POINTS = [("pre_gate", "pre_gate"), ("pre_gate", "post_gate"), ("post_gate", "post_gate")]


@pytest.fixture(scope="module", params=[False, True], ids=["sincos", "rotary"])
def rotary(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def model(rotary: bool) -> Any:
    """A tiny CogVideoX; constant parameters (norms, biases) are randomised so that a missing one shows."""
    torch.manual_seed(0)
    model: Any = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=20,
        text_embed_dim=24,
        num_layers=LAYERS,
        sample_width=10,
        sample_height=6,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
    )
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def inputs(rotary: bool, seed: int) -> dict[str, Any]:
    """Arguments of one step: other latents and another timestep for every seed."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.Generator().manual_seed(100)
    angle = torch.randn(IMAGE, 8, generator=tables).repeat_interleave(2, dim=1)
    return {
        "hidden_states": torch.randn(BATCH, 3, 4, 6, 10, generator=generator),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 24, generator=generator),
        "timestep": torch.tensor([900 - 50 * seed] * BATCH),
        "image_rotary_emb": (angle.cos(), angle.sin()) if rotary else None,
    }


def full(reference: Reference, kwargs: dict[str, Any], d: int = 0, fulls: int = 0) -> Tensor:
    return reference.run(kind="full", x=0, d=d, fulls=fulls, indices=None, **kwargs)


def cached(reference: Reference, kwargs: dict[str, Any], x: int, idx: Tensor | None = None) -> Tensor:
    indices = None if idx is None else lambda layer: idx
    return reference.run(kind="cached", x=x, d=0, fulls=1, indices=indices, **kwargs)


def sample(count: int, seed: int = 5) -> Tensor:
    return torch.randperm(IMAGE, generator=torch.Generator().manual_seed(seed))[:count]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


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


# --------------------------------------------------------------------------------------------------- toca, duca
@pytest.mark.parametrize("text", ["skip", "live"])
@pytest.mark.parametrize("policy", ["toca", "duca"])
def test_toca_and_duca_refresh_k_tokens(model: Any, rotary: bool, policy: str, text: str) -> None:
    reference = Reference(model, Config(policy=policy, ratio=0.25, grid=GRID, text=text))
    full(reference, inputs(rotary, 0))
    count = round(0.25 * IMAGE)
    for x in (1, 2, 3):
        y = dict(reference.y)
        reference.selected.clear()
        output = cached(reference, inputs(rotary, x), x)
        assert output.shape == (BATCH, 3, 4, 6, 10)
        assert bool(output.isfinite().all())
        if policy == "duca" and x == 2:
            assert not reference.selected
            assert all(torch.equal(y[k][0], reference.y[k][0]) for k in y)
            continue
        for layer in range(LAYERS):
            idx = reference.selected[layer]
            assert idx.shape == (BATCH, count)
            assert all(len(set(row.tolist())) == count for row in idx)
            assert torch.equal(reference.stamp[layer] == x, torch.zeros(BATCH, IMAGE).scatter(1, idx, 1) == 1)
            assert torch.equal(reference.y[layer, "attn"][0], y[layer, "attn"][0])
            changed = (reference.y[layer, "ffn"][0] != y[layer, "ffn"][0]).any(dim=2)
            assert torch.equal(changed[:, TEXT:], reference.stamp[layer] == x)
            assert bool((changed[:, :TEXT] == (text == "live")).all())


@pytest.mark.parametrize("policy", ["toca", "duca"])
def test_toca_and_duca_on_unchanged_inputs_change_nothing(model: Any, rotary: bool, policy: str) -> None:
    reference = Reference(model, Config(policy=policy, ratio=0.25, grid=GRID, text="live"))
    kwargs = inputs(rotary, 0)
    expected = full(reference, kwargs)
    close(cached(reference, kwargs, 1), expected)
    close(cached(reference, kwargs, 2), expected)


def test_attention_received_is_the_column_sum_of_attention() -> None:
    q, k = torch.randn(2, 2, 3, 9, 16)
    probability = functional.scaled_dot_product_attention(q, k, torch.eye(9).expand(2, 3, 9, 9))
    received = probability.transpose(2, 3).sum(dim=3)[:, :, 4:].sum(dim=1)
    score = attention_received(q, k, 4)
    close(score / score[:, :1], received / received[:, :1])
    close(score.norm(dim=1), torch.ones(2))


def test_value_smallness() -> None:
    """Norms over two heads of two channels; the text token, however large, does not count."""
    v = torch.tensor([[[9.0, 9], [3, 0], [0, 1], [0, 0]], [[9, 9], [0, 4], [2, 2], [1, 0]]])[None]
    close(value_smallness(v, 1), torch.tensor([[0, 1 - 3 / 5, 1 - 1 / 5]]))


def test_stale_tokens_go_first(model: Any) -> None:
    """An age of 9 steps outweighs an age of 1 and the bonus: two steps refresh different halves."""
    reference = Reference(model, Config(policy="toca", ratio=0.5, grid=GRID))
    reference.base[0], reference.stamp[0] = torch.zeros(1, IMAGE), torch.zeros(1, IMAGE)
    first = set(reference._best(0, IMAGE, 8)[0].tolist())
    second = set(reference._best(0, IMAGE, 9)[0].tolist())
    assert len(first) == len(second) == round(0.5 * IMAGE)
    assert not first & second


def test_best_of_each_cell_goes_first(model: Any) -> None:
    """As many tokens as cells and equal scores but for token 1: the bonus decides."""
    reference = Reference(model, Config(policy="toca", ratio=18 / IMAGE, grid=GRID))
    reference.base[0], reference.stamp[0] = torch.zeros(1, IMAGE), torch.zeros(1, IMAGE)
    reference.base[0][0, 1] = 0.1
    firsts = [0, 2, 4, 10, 12, 14]  # cells of a 3x5 frame: {0 1 5 6} {2 3 7 8} {4 9} {10 11} {12 13} {14}
    expected = {15 * f + n for f in range(3) for n in firsts} - {0} | {1}
    assert set(reference._best(0, IMAGE, 1)[0].tolist()) == expected


def test_cell_bonus_on_a_grid_that_cells_do_not_divide() -> None:
    # cells of the 3x3 frame: {0 1 3 4}, {2 5}, {6 7}, {8}
    score = torch.tensor([[0, 1, 5, 3, 2, 4, 7, 6, 0], [9, 1, 4, 3, 2, 5, 6, 7, -1]]).float()
    bonus = cell_bonus(torch.cat([score, score.flip(0)], dim=1), (2, 3, 3))
    first, second = [2, 3, 6, 8], [0, 5, 7, 8]
    assert [row.nonzero().flatten().tolist() for row in bonus] == [
        first + [9 + n for n in second],
        second + [9 + n for n in first],
    ]
    assert bonus.unique().tolist() == pytest.approx([0, 0.4])


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
        ("policy", "heroic"),
        ("keys", "text"),
        ("text", "fresh"),
        ("unsampled", "zero"),
        ("cache_point", ("pre_gate", "gate")),
        ("cache_point", "pre_gate"),
        ("order", -1),
        ("ratio", 0.0),
        ("ratio", 1.5),
        ("interval", 0),
        ("refresh_layers", None),
        ("refresh_layers", -1),
    ],
)
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
