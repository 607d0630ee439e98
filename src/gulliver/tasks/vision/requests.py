"""What is asked of an image classifier, and what it answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ImageRequest(BaseModel):
    """One picture: a file's bytes in base64 (PNG, JPEG, WebP, GIF or BMP), or pixels from 0 to 1, flat or nested."""

    model_config = ConfigDict(extra="forbid")

    image: str | list[Any] = Field(description="base64 of a picture's file, or numbers [channels, height, width]")


class ClassesResponse(BaseModel):
    """The likeliest class and the probability of each, by class number."""

    label: int
    probabilities: list[float]
