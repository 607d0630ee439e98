"""A test run that must see everything fails on what is missing; any other run skips it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from needed import missing, needed_module
from postgres import find_binaries

BOTH = pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])


@BOTH
def test_what_is_missing_fails_only_where_ci_is_true(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: Any) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(Path, "glob", lambda *_: [])
    with pytest.raises(outcome, match="no PostgreSQL server is installed"):
        find_binaries()
    with pytest.raises(outcome, match="no chromium"):
        missing("no chromium")


@pytest.mark.parametrize(("ci", "outcome"), [("true", ModuleNotFoundError), ("", pytest.skip.Exception)])
def test_a_missing_module_fails_only_where_ci_is_true(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: Any) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome):
        needed_module("gulliver_has_no_such_module", "pip install it")
