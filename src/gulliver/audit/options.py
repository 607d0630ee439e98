"""The options of the steps that measure."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gulliver.core.options import MaxRam, Options


class QualityOptions(Options):
    """Options of `quality`. What is left out takes the task's own default."""

    share: float = Field(1.0, gt=0, le=1, description="share of the usual windows or examples to score")
    family: dict[str, Any] = Field(default_factory=dict, description="options of the model's family")
    max_ram_bytes: MaxRam = None


class SpeedOptions(Options):
    """Options of `speed`."""

    repeats: int = Field(5, ge=2, le=1000, description="measured runs of every workload, after one unmeasured")
