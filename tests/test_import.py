"""What `import hero_fx` gives."""

from __future__ import annotations

import pytest

import hero_fx


def test_other_names_are_errors_as_ever() -> None:
    with pytest.raises(AttributeError, match="module 'hero_fx' has no attribute 'analyses'"):
        hero_fx.analyses  # type: ignore[attr-defined]  # noqa: B018
