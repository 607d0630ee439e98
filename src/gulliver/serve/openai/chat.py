"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.records import Request
from gulliver.serve.errors import bad_request
from gulliver.serve.json_route import JsonRoute
from gulliver.serve.openai import response_schemas, tools
from gulliver.serve.openai.answers import ChatAnswer
from gulliver.serve.openai.events import STREAMS, answered
from gulliver.serve.openai.generation import Bridge, Generation
from gulliver.serve.openai.request_schemas import ChatRequest, JsonSchemaFormat, Message, Tool
from gulliver.serve.openai.to_engine import engine_request, fitted, repeated
from gulliver.serve.state import ServedModel, State, record_of

MESSAGE_CHARACTERS = 16
"""What a template writes around a message, about."""


def router(state: State) -> APIRouter:
    """The route, for one server."""
    routes, bridge = APIRouter(route_class=JsonRoute), Bridge()

    @routes.post(
        "/v1/chat/completions",
        operation_id="create_chat_completion",
        tags=["language"],
        response_model=response_schemas.ChatCompletion,
        responses=STREAMS,
    )
    async def create(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer a conversation, whole or streamed."""
        model = state.model(body.model, "generate")
        call = record_of(request)
        call.model = model.name
        _check(body)
        slow = bool(body.tools or body.response_format)
        size = 1 << 30 if slow else sum(map(_characters, body.messages))
        asked = await state.prepared(size, _request, body, model, state.settings.timeout_seconds)
        run = Generation(model.engine, repeated([asked], body.n or 1), bridge, streamed=bool(body.stream))
        return await answered(run, request, ChatAnswer(model, call, body))

    return routes


def _characters(message: Message) -> int:
    """How much there is to read; a message costs something even when it is empty."""
    calls = sum(len(call.function.arguments) for call in message.tool_calls or ())
    return MESSAGE_CHARACTERS + len(message.text) + calls


def _check(body: ChatRequest) -> None:
    """Reject combinations that are not possible."""
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        raise bad_request("tool_choice needs tools; give at least one", "tool_choice")
    if body.response_format is not None and body.response_format.type != "text" and tools.usable(body):
        raise bad_request("response_format and tools exclude each other; set tool_choice to 'none'", "response_format")
    for place, message in enumerate(body.messages):
        if message.content is None and not message.tool_calls:
            raise bad_request(f"messages.{place} needs content or tool_calls", f"messages.{place}.content")
    names = [tool.function.name for tool in body.tools or []]
    if len(set(names)) < len(names):
        raise bad_request("duplicate tool name; give each tool its own", "tools")
    if isinstance(body.tool_choice, Tool) and not tools.forced(body):
        name = body.tool_choice.function.name
        raise bad_request(f"tool_choice names {name!r}, which is not among the tools", "tool_choice")


def _request(body: ChatRequest, model: ServedModel, timeout_seconds: float) -> Request:
    """Render and tokenize, and compile the grammar. ApiError when template or schema refuse."""
    text = model.engine.text
    messages = list(map(tools.template_message, body.messages))
    usable = tools.usable(body)
    try:
        if not usable:
            tokens = text.encode_chat(messages)
        elif text.shows_tools:
            tokens = text.encode_chat(messages, tools=tools.template_tools(usable))
        else:
            tokens = text.encode_chat(tools.told_of_tools(messages, usable))
    except ConfigError as error:
        raise bad_request(str(error), "messages") from None
    except RecursionError:
        raise bad_request("the request is nested too deep for the model's chat template", "messages") from None
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return replace(
        engine_request(body, tokens, model, timeout_seconds),
        max_tokens=fitted(tokens, asked, model, "messages"),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=_grammar(body, model),
    )


def _grammar(body: ChatRequest, model: ServedModel) -> Any:
    grammars, form = model.engine.grammars, body.response_format
    required = tools.forced(body)
    try:
        if required:
            return grammars.json_schema(tools.call_schema(required))
        if isinstance(form, JsonSchemaFormat):
            return grammars.json_schema(form.json_schema.schema_)
        return grammars.json_object() if form is not None and form.type == "json_object" else None
    except ConfigError as error:
        raise bad_request(str(error), "tools" if required else "response_format") from None
    except RecursionError:
        raise bad_request("the schema is nested too deep", "tools" if required else "response_format") from None
