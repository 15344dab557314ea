"""The eager reference where tokens are chosen by score (ToCa, DuCa), on small cases worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from .reference import Config, Reference
from .reference_parts import attention_received, cell_bonus, value_smallness
from .support.reference_model import BATCH, GRID, IMAGE, LAYERS, TEXT, cached, close, full, inputs, model_of


@pytest.fixture(scope="module", params=[False, True], ids=["sincos", "rotary"])
def rotary(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def model(rotary: bool) -> Any:
    return model_of(rotary)


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
