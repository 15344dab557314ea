"""Training: it learns, resumes to the same weights, and batches hold what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .support.examples import world

latents, model, scenes, train = (world(name) for name in ("latents", "model", "scenes", "train"))
TINY = ["--layers", "1", "--heads", "1", "--batch", "4", "--size", "8", "--warmup", "2"]


def options(run: Path, *more: str) -> list[str]:
    return ["--run", str(run), *TINY, *more]


def test_a_resumed_run_equals_one_without_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train.main(options(tmp_path / "whole", "--steps", "5", "--decay", "3"))
    advance = train.Training.advance

    def stop(self: Any) -> Any:
        if self.step == 3:
            raise KeyboardInterrupt
        return advance(self)

    with monkeypatch.context() as broken:
        broken.setattr(train.Training, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            train.main(options(tmp_path / "parts", "--steps", "5", "--decay", "3", "--save-every", "2"))
    parts = train.main(options(tmp_path / "parts", "--steps", "5", "--decay", "3"))
    assert whole.step == parts.step == 5
    for one, other in ((whole.model, parts.model), (whole.average, parts.average)):
        for name, value in one.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[name], rtol=0, atol=0, msg=name)
    assert not torch.equal(whole.model.proj_out.weight, whole.average.proj_out.weight)
    logged = [json.loads(line) for line in (tmp_path / "parts" / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 3, 3, 4, 5]  # the third went down with the break
    assert logged[2] == logged[3]


def test_the_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    training = train.Training(train.parse(options(tmp_path, "--steps", "10", "--decay", "4")))
    rates = []
    for training.step in range(10):
        rates.append(training.rate())
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_without_decay_the_rate_stays(tmp_path: Path) -> None:
    training = train.Training(train.parse(options(tmp_path, "--steps", "10", "--decay", "0")))
    training.step = 9
    assert training.rate() == 1


def test_a_given_time_ends_it(tmp_path: Path) -> None:
    training = train.main(options(tmp_path, "--until", "0"))
    assert training.step == 0
    assert (tmp_path / "checkpoint.pt").exists()


def test_batches_hold_both_tasks_and_drop_conditions(tmp_path: Path) -> None:
    training = train.Training(train.parse([*options(tmp_path), "--batch", "64"]))
    clean, given, text = training.batch()
    assert clean.shape == (64, 6, 22, 4, 4)
    told = given[:, :, 12, 0, 0].tolist()
    names = {tuple(model.task_text([task])[0].argmax(-1).tolist()): task for task in (None, *model.TASKS)}
    tasks = [names[tuple(row)] for row in text.argmax(-1).tolist()]
    ends, first, everything, nothing = [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0], [1] * 6, [0] * 6
    assert tasks[1::2] == ["reconstruction"] * 32
    assert told[1::2] == [everything] * 32
    kinds = list(zip(tasks[::2], told[::2], strict=True))
    assert 20 <= kinds.count(("planning", ends)) < 32
    assert kinds.count((None, nothing)) + kinds.count((None, first)) == 32 - kinds.count(("planning", ends))
    training.step += 1
    assert not torch.isclose(training.batch()[0][:4], clean[:4]).all()


def test_a_share_of_the_clips_is_planning_and_their_paths_are_straight(tmp_path: Path) -> None:
    """What the end frames do not tell is not asked of planning; reconstruction sees the paths as they are."""
    training = train.Training(train.parse([*options(tmp_path), "--batch", "16", "--planning", "3"]))
    clean, _, text = training.batch()
    reconstruction = (text.argmax(-1) == model.task_text(["reconstruction"]).argmax(-1)).all(dim=1)
    assert reconstruction.tolist() == [False, False, False, True] * 4
    places = clean[:, :, 19:22].mean(dim=(3, 4))  # the raymap's origins
    bow = places.diff(n=2, dim=1).abs().amax(dim=(1, 2))
    assert bow[~reconstruction].max() < 1e-5
    assert bow[reconstruction].min() > 1e-3


class AttentionDtypes(TorchDispatchMode):
    """Notes the dtypes that attention runs in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_bfloat16_learns_the_same_with_attention_in_float32(tmp_path: Path) -> None:
    wide, narrow = (train.Training(train.parse([*options(tmp_path), *more])) for more in ([], ["--bf16"]))
    with AttentionDtypes() as attention:
        for _ in range(4):
            one, other = wide.advance()["loss"], narrow.advance()["loss"]
            assert abs(other / one - 1) < 0.02
    assert one != other
    assert attention.seen == {torch.float32}


def test_training_never_sees_held_out_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(seeds: range) -> Any:
        seen.extend(seeds)
        return scenes.sample_scenes(seeds)

    monkeypatch.setattr(train, "sample_scenes", spy)
    training = train.Training(train.parse(options(tmp_path)))
    training.step = 100_000
    training.batch()
    training.step += 1
    training.batch()
    assert len(set(seen)) == 8
    assert min(seen) >= scenes.TRAINING > scenes.HELD_OUT + 2**30


def test_training_and_held_out_scenes_differ() -> None:
    """By what is drawn, not by number alone: the generator looks at the last 32 bits of a seed only."""
    numbers = [first + i for first in (scenes.HELD_OUT, scenes.TRAINING) for i in (0, 1, train.MOST, 2**30)]
    draws = scenes.sample_scenes(numbers).camera
    assert len({tuple(row) for row in draws.tolist()}) == len(numbers)
    for seed in (-1, 2**32, 2**40):
        with pytest.raises(ValueError, match=f"seed={seed}: scenes have the seeds"):
            scenes.sample_scenes([seed])


def test_exported_it_is_a_pipeline_of_the_moving_average(tmp_path: Path) -> None:
    training = train.main(options(tmp_path / "run", "--steps", "3", "--export", str(tmp_path / "weights")))
    loaded = world("pipeline").WorldModelPipeline.from_pretrained(tmp_path / "weights").transformer
    for name, value in training.average.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.half().float(), rtol=0, atol=0)


def test_losses_by_modality_start_at_the_velocitys_size_and_fall(tmp_path: Path) -> None:
    training = train.Training(train.parse(options(tmp_path, "--batch", "8")))
    first = training.advance()
    # An untrained model says 0, so the error is the velocity itself, of variance about 1, times weights of at most 1.
    assert all(0.2 < first[name] < 1.5 for name in latents.MODALITIES)
    batch = training.batch()
    training.batch = lambda: batch
    for _ in range(60):
        last = training.advance()
    assert last["loss"] < 0.8 * first["loss"]


def test_a_run_goes_on_from_exported_weights(tmp_path: Path) -> None:
    """On scenes of its own; a resumption needs neither the weights nor the number of the first step again."""
    train.main(options(tmp_path / "a", "--steps", "3", "--decay", "0", "--export", str(tmp_path / "out")))
    more = ["--weights", str(tmp_path / "out"), "--first", "3"]
    begun = train.Training(train.parse(options(tmp_path / "b", "--steps", "9", "--decay", "0", *more)))
    exported = train.WorldModelPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    for model in (begun.model, begun.average):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, exported[name], rtol=0, atol=0, msg=name)
    assert (begun.step, begun.rate()) == (3, 0.5)  # it warms up again
    parts = ["--steps", "6", "--decay", "2"]
    whole = train.main(options(tmp_path / "b", *parts, *more))
    train.main(options(tmp_path / "c", *parts, *more, "--until", "0"))
    resumed = train.main(options(tmp_path / "c", *parts))
    assert whole.step == resumed.step == 6
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(value, resumed.average.state_dict()[name], rtol=0, atol=0, msg=name)


def test_a_first_step_beyond_the_last_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(options(tmp_path, "--first", "9", "--steps", "9"))
    assert "--first 9: it must be at least 0 and below --steps 9" in capsys.readouterr().err
