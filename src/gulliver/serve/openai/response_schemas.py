"""What is answered, for the OpenAPI document. answers.py writes it; tests hold them to this."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from gulliver.serve.openai.request_schemas import ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]


class EmbeddingUsage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class PromptDetails(BaseModel):
    """How many of the prompt's tokens were found in the cache."""

    cached_tokens: int


class Usage(EmbeddingUsage):
    """Tokens counted."""

    completion_tokens: int
    prompt_tokens_details: PromptDetails


class Answer(BaseModel):
    """What the answers of both kinds of completion say."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class TopLogprob(BaseModel):
    """One token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token chosen, and its rivals."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs of a message."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """What the model wrote."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionLogprobs(BaseModel):
    """Logprobs of a text; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of n texts of each prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(Answer):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Embedding(BaseModel):
    """One vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
