"""`examples/zoo.py`: what it finds in models of the zoo, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .support.examples import example

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own


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
