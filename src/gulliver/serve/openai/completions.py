"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.records import Request
from gulliver.serve.errors import bad_request
from gulliver.serve.json_route import JsonRoute
from gulliver.serve.openai import response_schemas
from gulliver.serve.openai.answers import CompletionAnswer
from gulliver.serve.openai.events import STREAMS, answered
from gulliver.serve.openai.generation import Bridge, Generation
from gulliver.serve.openai.request_schemas import MAX_PROMPTS, CompletionRequest
from gulliver.serve.openai.to_engine import engine_request, fitted, repeated, rows_of
from gulliver.serve.state import ServedModel, State, record_of

DEFAULT_TOKENS = 16


def router(state: State) -> APIRouter:
    """The route, for one server."""
    routes, bridge = APIRouter(route_class=JsonRoute), Bridge()

    @routes.post(
        "/v1/completions",
        operation_id="create_completion",
        tags=["language"],
        response_model=response_schemas.Completion,
        responses=STREAMS,
    )
    async def create(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue a text, or several, whole or streamed."""
        model = state.model(body.model, "generate")
        call = record_of(request)
        call.model = model.name
        _check(body)
        rows, times = rows_of(body.prompt, "prompt"), body.n or 1
        if len(rows) * times > MAX_PROMPTS:
            message = f"{len(rows) * times} completions were requested; a request may ask for at most {MAX_PROMPTS}"
            raise bad_request(message, "n")
        prompts = await state.prepared(sum(map(len, rows)), _prompts, rows, model, bool(body.echo))
        asked = [_request(body, tokens, model, state.settings.timeout_seconds) for tokens, _ in prompts]
        run = Generation(model.engine, repeated(asked, times), bridge, streamed=bool(body.stream))
        echoes = [text for _, text in prompts for _ in range(times)]
        return await answered(run, request, CompletionAnswer(model, call, body, echoes))

    return routes


def _check(body: CompletionRequest) -> None:
    """Reject combinations that are not possible or not supported."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad_request("best_of must equal n; every answer is returned", "best_of", "unsupported_value")
    if body.suffix:
        raise bad_request("suffix is not supported: these models do not support fill-in-the-middle", "suffix")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens is 0; without echo it must be at least 1", "max_tokens")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")


def _prompts(rows: Sequence[str | list[int]], model: ServedModel, echo: bool) -> list[tuple[Sequence[int], str]]:
    """(tokens, text) of every prompt; the text of tokens where they are repeated. ApiError when one has no tokens."""
    found, text, vocabulary = [], model.engine.text, model.engine.decoder.vocabulary
    for row in rows:
        try:
            tokens = text.encode(row) if isinstance(row, str) else row
        except ConfigError as error:
            raise bad_request(str(error), "prompt") from None
        if not tokens:
            why = ", and this model's tokenizer adds no token" if isinstance(row, str) else ""
            raise bad_request(f"a prompt is empty{why}; give at least one word or token", "prompt")
        if (largest := max(tokens)) >= vocabulary:
            raise bad_request(f"token {largest} does not exist; ids go from 0 to {vocabulary - 1}", "prompt")
        found.append((tokens, row if isinstance(row, str) else text.decode(tokens) if echo else ""))
    return found


def _request(body: CompletionRequest, tokens: Sequence[int], model: ServedModel, timeout_seconds: float) -> Request:
    asked = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    only_prompt = asked == 0  # an engine gives no answer of no tokens; then the prompt's logprobs are all it does
    return replace(
        engine_request(body, tokens, model, timeout_seconds),
        max_tokens=fitted(tokens, asked, model, "prompt"),
        top_logprobs=0 if body.logprobs is None and only_prompt else body.logprobs,
        echo_logprobs=bool(body.echo) and (body.logprobs is not None or only_prompt),
    )
