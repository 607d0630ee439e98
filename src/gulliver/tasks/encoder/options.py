"""What encoders' data need."""

from __future__ import annotations

from pydantic import Field

from gulliver.tasks.options import TextOptions


class EncoderOptions(TextOptions):
    """Options of the encoder family."""

    texts: int = Field(256, ge=2, description="texts that are scored")
