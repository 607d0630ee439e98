"""What is asked about digits, and what is answered."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DigitsRequest(BaseModel):
    """A sequence whose next digit is asked."""

    model_config = ConfigDict(extra="forbid")

    digits: str = Field(pattern="^[0-9]{4,}$", max_length=1000, description="at least 4 digits")


class DigitResponse(BaseModel):
    """The likeliest next digit and its probability."""

    digit: int
    probability: float
