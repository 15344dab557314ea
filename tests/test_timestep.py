"""The reader of timesteps against tensors of every make."""

from __future__ import annotations

import gc

import pytest
import torch

from hero_fx.runtime.timestep import AmbiguousCall, TimestepReader

DTYPES = [torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_reader_values(dtype: torch.dtype, tables: bool, mode: type[torch.no_grad]) -> None:
    table = torch.tensor([7, 5, 3, 2, 0]).to(dtype)
    reader = TimestepReader(tables_on_cpu=tables)
    with mode():
        for _ in range(2):
            for index, value in enumerate([7.0, 5.0, 3.0, 2.0, 0.0]):
                t = table[index]
                for view in (t, t.expand(3), t[None], table[index : index + 1], t.expand(2, 3), t.clone()):
                    assert reader.read(view).values == (value,)
        assert reader.read(table).values == (7.0, 5.0, 3.0, 2.0, 0.0)
        assert reader.read(table[1:4].expand(2, 3), batch={2}).values == (5.0, 3.0, 2.0)
        assert reader.read(torch.arange(3)).values == (0.0, 1.0, 2.0)  # an inference tensor in inference mode
        assert all(isinstance(value, float) for value in reader.read(table).values)


def test_reader_reads_a_table_once() -> None:
    table = torch.linspace(999, 19, 50)
    reader = TimestepReader(tables_on_cpu=True)
    values = [reader.read(t.expand(2)).values[0] for t in table]
    assert values == table.tolist()
    assert reader.reads == 1
    assert reader.read(table.view(torch.int32)[0]).values == (table.view(torch.int32)[0].item(),)
    assert reader.reads == 2  # another dtype, another table
    without = TimestepReader()
    assert [without.read(t).values[0] for t in table] == values
    assert without.reads == 50


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reader_notices_writes(mode: type[torch.no_grad]) -> None:
    table = torch.tensor([9.0, 8.0, 7.0])
    reader = TimestepReader(tables_on_cpu=True)
    assert reader.read(table[1]).values == (8.0,)
    with mode():
        table.mul_(2)
        assert reader.read(table[1]).values == (16.0,)
        table[2:].zero_()
        assert reader.read(table[2].expand(4)).values == (0.0,)
    assert reader.reads == 3


def test_reader_notices_that_a_storage_was_resized() -> None:
    table = torch.tensor([9.0, 8.0, 7.0])
    reader = TimestepReader(tables_on_cpu=True)
    reader.read(table[1])
    table.untyped_storage().resize_(8)
    assert reader.read(table[:1]).values == (9.0,)
    assert reader.reads == 2


def test_reader_is_not_fooled_by_a_reused_address() -> None:
    reader = TimestepReader(tables_on_cpu=True)
    for value in range(40):
        table = torch.tensor([float(value), -1.0])
        assert reader.read(table[0]).values == (float(value),)
        del table
        gc.collect(0)
    assert reader.reads == 40
    assert len(reader._tables) == 4


def test_reader_does_without_a_table_where_it_cannot_be_trusted() -> None:
    reader = TimestepReader(tables_on_cpu=True)
    with torch.inference_mode():
        untracked = torch.arange(5)
        assert reader.read(untracked[3]).values == (3.0,)
        untracked.add_(1)
        assert reader.read(untracked[3]).values == (4.0,)
    assert reader.read(torch.arange(70_000)[3]).values == (3.0,)
    odd = torch.zeros(17, dtype=torch.uint8)
    assert reader.read(odd[:8].view(torch.int64)).values == (0.0,)
    assert reader.read(torch.tensor(5)).values == (5.0,)
    assert not reader._tables


def test_reader_takes_tensors_that_need_gradients() -> None:
    leaf = torch.tensor([2.0, 1.0], requires_grad=True)
    for reader in (TimestepReader(), TimestepReader(tables_on_cpu=True)):
        assert reader.read(leaf[1]).values == (1.0,)
        assert reader.read(leaf).values == (2.0, 1.0)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor(True), r"timestep has dtype torch\.bool; allowed"),
        (torch.tensor(1j), r"timestep has dtype torch\.complex64"),
        (torch.empty(0, 3), r"timestep has shape \(0, 3\), so no value"),
    ],
)
def test_reader_errors(t: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimestepReader().read(t)


def test_a_step_of_equal_tokens_is_one_value() -> None:
    assert TimestepReader().read(torch.full((2, 3), 7)).values == (7.0,)
    assert TimestepReader().read(torch.tensor([[0, 7, 7], [0, 7, 7]]), batch={2}).values == (0.0, 7.0, 7.0)


def test_elements_of_a_batch_at_different_timesteps_are_refused() -> None:
    reader = TimestepReader()
    for t in (torch.tensor([100, 979]), torch.tensor([[5.0, 5.0], [5.0, 6.0]])):
        with pytest.raises(
            AmbiguousCall, match=r"2 elements of the batch are at different timesteps \(.*hero_fx.session"
        ):
            reader.read(t, batch={2})
    # The axis is not that of the batch: frames at times of their own.
    assert reader.read(torch.tensor([100, 979]), batch={1, 4}).values == (100.0, 979.0)


def test_the_place_in_the_table_tells_equal_values_apart() -> None:
    table, reader = torch.tensor([9.0, 9.0, 8.0]), TimestepReader()
    first, again, second, other = (reader.read(t) for t in (table[0], table[0].expand(3), table[1], table.clone()[0]))
    assert first.values == second.values == other.values
    assert first.table == again.table
    assert len({first.table, second.table, other.table}) == 3
    assert reader.read(torch.tensor(9.0)).table is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_timesteps_that_are_not_finite(bad: float) -> None:
    for t in (torch.tensor(bad), torch.tensor([0.0, bad]), torch.tensor([[0.0, bad], [1.0, bad]])):
        with pytest.raises(ValueError, match="is not finite"):
            TimestepReader().read(t, batch={2})
