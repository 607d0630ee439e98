"""What may be asked: the bodies of OpenAI's requests, checked strictly.

Every list and object has a greatest length, and checking stops at the first fault in it: pydantic makes an error of a
kilobyte for each of a million wrong elements otherwise.

A field that OpenAI defines and that has no meaning here is accepted and ignored, or refused where ignoring it would
change the answer. Unknown fields are rejected, naming the nearest. docs/serving.md has the tables.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_STOPS = 16
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_MESSAGES = 4096
MAX_PARTS = 4096  # of a message
MAX_CALLS = 256  # in a message
MAX_BIASES = 1024

Ignored = Annotated[Any, Field(description="accepted and ignored")]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
ModelName = Annotated[str, Field(max_length=512, description="a name that /v1/models lists")]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def first_unknown(given: Any, known: Collection[str]) -> Any:
    """An object without its unknown fields but the first, which is enough to refuse it; anything else as it is."""
    if not isinstance(given, dict) or len(given) <= len(known):
        return given
    unknown = next((name for name in given if name not in known), None)
    return {name: value for name, value in given.items() if name in known or name == unknown}


def _few_biases(given: Any) -> Any:
    """Pydantic looks at every entry of an object before it counts them."""
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens can be biased")
    return given


class Body(BaseModel):
    """Strict: no text where a number belongs, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, given: Any) -> Any:
        return first_unknown(given, cls.model_fields)


class Lenient(BaseModel):
    """Strict about types; fields it does not know are left out, so that answers of other servers can be sent back."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class StreamOptions(Body):
    """`include_usage`: one more chunk at the end, with the counts of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationFields(Body):
    """How tokens are chosen, and when to stop."""

    model: ModelName
    temperature: float | None = Field(None, ge=0, le=2, description="0: the likeliest token; default 1")
    top_p: float | None = Field(None, ge=0, le=1, description="default 1")
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="extra field; 0, -1: all")
    min_p: float | None = Field(None, ge=0, le=1, description="extra field; default 0")
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="extra field; default 1")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_few_biases)] = (
        Field(None, max_length=MAX_BIASES)
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        None, description="extra field"
    )
    ignore_eos: bool | None = Field(None, description="extra field: continue past the end token, for benchmarks")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Ignored = None


class ContentPart(Lenient):
    """A part of a message; text alone, for these models read nothing else."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class Called(Lenient):
    """What the model called: a name, and arguments as JSON text."""

    name: str = Field(max_length=256)
    arguments: str = ""


class ToolCall(Lenient):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class Message(Lenient):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text or part.refusal or "" for part in parts)


class Function(Lenient):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    """One tool."""

    type: Literal["function"]
    function: Function


class PlainFormat(Lenient):
    """Free text, or any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchema(Lenient):
    """A JSON schema by name."""

    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Lenient):
    """JSON that meets a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(GenerationFields):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="the older name")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="default: the rest of the context")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: Annotated[PlainFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=4, fail_fast=True)] | None = Field(
        None, description="text only"
    )
    metadata: Ignored = None
    moderation: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning_effort: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    verbosity: Ignored = None


Tokens = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
ManyTokens = Annotated[list[Tokens], Field(fail_fast=True, max_length=MAX_PROMPTS)]
Prompts = Annotated[
    str | Texts | Tokens | ManyTokens, Field(description="a text, texts, token ids, or lists of token ids")
]


class CompletionRequest(GenerationFields):
    """The body of POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="default 16; 0 needs echo")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="must equal n")
    suffix: str | None = Field(None, description="must be empty: fill-in-the-middle is not supported")


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings."""

    model: ModelName
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=MAX_TOKENS, description="must be the model's own width")
    truncate: bool | None = Field(None, description="extra field: cut a text that is too long, else it is rejected")
    user: Ignored = None
