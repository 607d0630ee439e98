"""What is asked of an encoder, and what it answers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TextsRequest(BaseModel):
    """Texts to turn into vectors."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(min_length=1, max_length=2048, fail_fast=True, description="texts, one vector each")
    truncate: bool = Field(False, description="cut texts that are too long instead of refusing them")


class VectorsResponse(BaseModel):
    """One vector per text, in order; how many tokens were read."""

    vectors: list[list[float]]
    prompt_tokens: int
