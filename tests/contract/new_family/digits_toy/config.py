"""Which models are of the digits family, told without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_TYPE = "digits_toy"
CONTEXT = 4
"""Digits that the next one is told from."""


def claims(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json holds a network of this family."""
    del folder
    return config.get("model_type") == MODEL_TYPE
