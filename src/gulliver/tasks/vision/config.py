"""Which models are of the vision family, told without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARCHITECTURE = "GulliverInception"
MODEL_TYPE = "gulliver_inception"


def claims(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json holds an image classifier of ours."""
    del folder
    return config.get("model_type") == MODEL_TYPE
