"""Two processes that share the tokens (diffusers' Ulysses, over gloo) against one process that has all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig
from torch import Tensor

import hero_fx

from .support import ranks, ranks_joint, tiny, toys
from .support.once import made_once
from .support.ranks import OWN, POLICIES, RANKS, STEPS, Seen
from .support.tracing import Variants

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.ranks", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=900)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """By rank."""
    folder = made_once(tmp_path_factory, "ranks", run_ranks)
    return [Seen(**torch.load(folder / f"{rank}.pt", weights_only=False)) for rank in range(RANKS)]


class _Given:
    """In place of a stepper's selections: the tokens that the ranks sampled, one after the other."""

    def __init__(self, own: list[Tensor], tokens: int = OWN) -> None:
        """`tokens`: of each rank."""
        self._own, self._tokens = iter(own), tokens

    def at(self, pattern: tuple[bool, ...]) -> tuple[Tensor, ...]:
        own = next(self._own)
        return (torch.cat([own + rank * self._tokens for rank in range(RANKS)]),)


@pytest.fixture(scope="module")
def alone(seen: list[Seen]) -> dict[str, list[Tensor]]:
    """By policy, the outputs of one process that refreshes the tokens that the ranks did."""
    torch._dynamo.reset()
    names = (*POLICIES, "fsdp")
    variants = Variants(**{name: ranks.backend(name) for name in names})
    call = toys.torch_compile(ranks.wan(), backend=variants, fullgraph=True)

    def outputs(name: str) -> list[Tensor]:
        variants.now, selections = name, seen[0].selections.get(name, []) if name in POLICIES else []

        def given() -> None:
            (stepper,) = variants.backends[name].steppers
            if selections and not isinstance(stepper.selections, _Given):
                stepper.selections = _Given(selections)  # type: ignore[assignment]

        return ranks.trajectory(call, given)

    return {name: outputs(name) for name in names}


@pytest.mark.parametrize("name", POLICIES)
def test_ranks_give_what_one_process_gives(seen: list[Seen], alone: dict[str, list[Tensor]], name: str) -> None:
    for rank in seen:
        assert rank.full[name] == [step in ranks.FULL for step in range(STEPS)]
        assert tiny.worst(rank.outputs[name], alone[name]) < 1e-5


def test_names_alone_tell_steps_by_their_timesteps(seen: list[Seen]) -> None:
    for rank in seen:
        assert toys.same(rank.outputs["names alone"], rank.outputs["fora"])


@pytest.mark.parametrize("name", POLICIES)
def test_cached_layers_exchange_nothing(seen: list[Seen], name: str) -> None:
    """Four exchanges for each attention that a step runs: queries, keys, values, results."""
    refreshed = 1 if name in ("hero", "sampled keys") else 0
    assert {rank.exchanges[name] for rank in seen} == {(2 * 4, refreshed * 4)}


@pytest.mark.parametrize("name", ["hero", "sampled keys"])
def test_ranks_refresh_the_same_tokens_of_their_own(seen: list[Seen], name: str) -> None:
    one, other = (rank.selections[name] for rank in seen)
    assert toys.same(one, other)
    assert len({tuple(drawn.tolist()) for drawn in one}) > 1
    assert {rank.grids[name] for rank in seen} == {(1, 4, 6)}


def test_joint_attention_of_text_and_image(seen: list[Seen]) -> None:
    """Each rank has a part of the text and a part of the image: the tokens of a rank follow those of the rank before."""
    given = {name: _Given(run.selections, 12) for name, run in seen[0].joint.items()}
    alone = ranks_joint.run_all(ranks_joint.flux(), given)
    for rank in seen:
        for name, run in rank.joint.items():
            assert run.full == alone[name].full == [step in ranks_joint.FULL for step in range(ranks_joint.STEPS)]
            assert tiny.worst(run.outputs, alone[name].outputs) < 1e-5, name
            refreshed = 1 if name in ("hero", "live text") else 0
            assert run.exchanges == (2 * 4, refreshed * 4), name
            assert toys.same(run.selections, seen[0].joint[name].selections)


def test_a_model_of_several_processes_is_verified(seen: list[Seen]) -> None:
    assert [rank.failed for rank in seen] == [[]] * RANKS


def test_weights_that_are_sharded(seen: list[Seen], alone: dict[str, list[Tensor]]) -> None:
    """FSDP2, each rank with all tokens."""
    for rank in seen:
        assert rank.full["fsdp"] == [step in ranks.FULL for step in range(STEPS)]
        assert tiny.worst(rank.outputs["fsdp"], alone["fsdp"]) < 1e-5


REFUSALS = {
    "a budget": "max_state_bytes=1000000000 with a model that several processes run.*Leave max_state_bytes out",
    "scores": "policy='toca' chooses tokens by attention, of which each process has some heads only.*Use policy='hero'",
    "landmarks": "l0_attention cannot be cached as planned.*use keys='all' or 'sampled'.*Use refresh_layers=0",
    "no names": r"name it with hero_fx.calling\(lane=..., step_index=...\)",
    "cut short": r"lies in other memory than before.*call hero_fx.reset\(\) in each",
    "save": "a file cannot hold their group: keep Inductor's cache directory",
    "fsdp of blocks": "fully_shard was called for 2 parts of the model.*blocks.0.*call fully_shard for the transformer as a whole",
    "calibrate": "calibrate the model in one process, before enable_parallelism",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_ranks_might_decide_differently_is_refused(seen: list[Seen], what: str) -> None:
    for rank in seen:
        assert re.search(REFUSALS[what], rank.errors[what], re.DOTALL), rank.errors[what]


def test_ring_attention_is_refused() -> None:
    model: Any = ranks.wan()
    model._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    call = toys.torch_compile(model, backend=hero_fx.backend(inner="eager"))
    with pytest.raises(Exception, match=r"(?s)ring_degree=2.*log-sum-exp.*ContextParallelConfig\(ulysses_degree=2\)"):
        ranks.trajectory(call)
