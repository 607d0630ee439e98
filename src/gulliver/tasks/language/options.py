"""What language models' data and windows need."""

from __future__ import annotations

from pydantic import Field

from gulliver.tasks.options import TextOptions


class LanguageOptions(TextOptions):
    """Options of the language family."""

    windows: int = Field(24, ge=2, description="windows of text that are scored")
    context: int = Field(1024, ge=2, description="tokens in a window that is scored")
