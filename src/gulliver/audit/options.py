"""The options of the steps that measure."""

from __future__ import annotations

from pydantic import Field

from gulliver.core.options import Options


class QualityOptions(Options):
    """Options of `quality`. What is left out takes the task's own default."""

    share: float | None = Field(None, gt=0, le=1, description="share of the usual windows or examples to score")
    windows: int | None = Field(None, ge=2, description="windows to score, for families that read sequences")
    context: int | None = Field(None, ge=2, description="tokens in a window, for families that read sequences")


class SpeedOptions(Options):
    """Options of `speed`."""

    repeats: int = Field(5, ge=2, le=1000, description="measured runs of every workload, after one unmeasured")
