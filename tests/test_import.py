"""What `import hero_fx` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hero_fx


def test_analysis_is_there_without_an_import_of_its_own() -> None:
    code = (
        "import sys, hero_fx\n"
        "assert 'hero_fx.stability' not in sys.modules, 'imported although nobody uses it'\n"
        "print(hero_fx.stability.Recorder.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "Recorder\n"), result.stderr


def test_other_names_are_errors_as_ever() -> None:
    with pytest.raises(AttributeError, match="module 'hero_fx' has no attribute 'analyses'"):
        hero_fx.analyses  # type: ignore[attr-defined]  # noqa: B018
