"""What tests need beside installed packages: where it is missing they are skipped, or fail where CI=true."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """End the running test: nothing may be left out unseen where CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def needed_module(name: str, reason: str) -> Any:
    """An imported module. The test file that asks for it is skipped without it, or fails where CI=true."""
    if os.environ.get("CI") == "true":
        return import_module(name)
    return pytest.importorskip(name, reason=reason)
