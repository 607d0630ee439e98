"""What is asked of a language model, and what it answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gulliver.tasks.answerer import MAX_TOKENS, TEMPERATURE


class TextRequest(BaseModel):
    """A prompt, or messages for the model's chat template, and how the answer is drawn."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = Field(None, min_length=1, description="the text to answer or, when raw, to continue")
    messages: list[dict[str, Any]] | None = Field(
        None, min_length=1, max_length=4096, fail_fast=True, description="a chat: role and content each"
    )
    system: str | None = Field(None, description="the system message, for a model with a chat template")
    raw: bool = Field(False, description="continue the prompt itself, without the chat template")
    max_tokens: int = Field(MAX_TOKENS, ge=1, description="longest answer in tokens")
    temperature: float = Field(TEMPERATURE, ge=0, allow_inf_nan=False, description="sampling temperature; 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that reach this probability")
    top_k: int = Field(0, ge=0, description="keep this many of the likeliest tokens; 0: all")
    min_p: float = Field(0.0, ge=0, le=1, description="keep tokens this fraction as likely as the likeliest")
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False, description="above 1: repeats are less likely")
    seed: int | None = Field(None, description="the same seed gives the same answer")
    stop: list[Annotated[str, Field(max_length=1000)]] = Field(
        default_factory=list, max_length=16, fail_fast=True, description="texts that end the answer"
    )

    @model_validator(mode="after")
    def _one_of(self) -> TextRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class TextResponse(BaseModel):
    """The answer."""

    text: str
    finish_reason: str = Field(description='"stop", "length" or "timeout"')
    prompt_tokens: int
    completion_tokens: int
