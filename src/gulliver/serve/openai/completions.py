"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.records import Request
from gulliver.serve.errors import bad_request
from gulliver.serve.json_route import JsonRoute, answers_with
from gulliver.serve.openai import response_schemas
from gulliver.serve.openai.completion_json import CompletionAnswer
from gulliver.serve.openai.events import answered
from gulliver.serve.openai.generation import Bridge, Generation
from gulliver.serve.openai.request_schemas import MAX_PROMPTS, CompletionRequest
from gulliver.serve.openai.to_engine import checked_tokens, fitted, refuse_size, repeated, sampling_of, stops_of
from gulliver.serve.state import ServedModel, State, record_of

DEFAULT_TOKENS = 16


@dataclass(frozen=True)
class CompletionPrompt:
    """One prompt: its tokens, and its text where it is repeated in the answer."""

    tokens: tuple[int, ...]
    text: str


def router(state: State) -> APIRouter:
    """The route, for one server."""
    routes, bridge = APIRouter(route_class=JsonRoute), Bridge()

    @routes.post(
        "/v1/completions",
        operation_id="create_completion",
        tags=["language"],
        responses=answers_with(response_schemas.Completion, streams=True),
    )
    async def create(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue a text, or several, whole or streamed."""
        model = state.model(body.model, "generate")
        call = record_of(request)
        call.model = model.name
        _check(body)
        prompts = await state.prepared(_characters(body), _prompts, body, model)
        times = body.n or 1
        refuse_size(len(prompts) * times, MAX_PROMPTS, "n")
        requests = [_request(body, prompt, model, state.settings.timeout_seconds) for prompt in prompts]
        run = Generation(model.engine, repeated(requests, times), bridge, streamed=bool(body.stream))
        echoes = [prompt.text for prompt in prompts for _ in range(times)] if body.echo else []
        writer = CompletionAnswer(
            model,
            call,
            logprobs=body.logprobs is not None,
            echoes=echoes,
            per_prompt=times,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            hide_answer=body.max_tokens == 0,
        )
        return await answered(run, request, writer, streamed=bool(body.stream))

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


def _characters(body: CompletionRequest) -> int:
    """How much there is to read."""
    prompt = body.prompt
    return len(prompt) if isinstance(prompt, str) else sum(len(row) if isinstance(row, str) else 1 for row in prompt)


def _prompts(body: CompletionRequest, model: ServedModel) -> list[CompletionPrompt]:
    """Every prompt as tokens. ApiError when there is none, or one has no tokens."""
    prompt = body.prompt
    rows: Sequence[str | Sequence[int]]
    if isinstance(prompt, str):
        rows = [prompt]
    elif prompt and isinstance(prompt[0], int):
        rows = [[token for token in prompt if isinstance(token, int)]]
    else:
        rows = [row for row in prompt if not isinstance(row, int)]
    if not rows:
        raise bad_request("prompt is an empty list; give at least one text or token", "prompt")
    return [_prompt(row, bool(body.echo), model) for row in rows]


def _prompt(row: str | Sequence[int], echo: bool, model: ServedModel) -> CompletionPrompt:
    text = model.engine.text
    if not isinstance(row, str):
        tokens = checked_tokens(row, model.engine.decoder.vocabulary, "prompt")
        return CompletionPrompt(tokens, text.decode(tokens) if echo else "")
    try:
        tokens = tuple(text.encode(row))
    except ConfigError as error:
        raise bad_request(str(error), "prompt") from None
    if not tokens:
        raise bad_request(
            "a prompt is empty, and this model's tokenizer adds no token; give at least one word", "prompt"
        )
    return CompletionPrompt(tokens, row)


def _request(body: CompletionRequest, prompt: CompletionPrompt, model: ServedModel, timeout_seconds: float) -> Request:
    asked = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    only_prompt = asked == 0  # an engine gives no answer of no tokens; then the prompt's logprobs are all it does
    try:
        return Request(
            prompt=prompt.tokens,
            max_tokens=fitted(prompt.tokens, asked, model, "prompt"),
            sampling=sampling_of(body, model.engine.decoder.vocabulary),
            stop=stops_of(body),
            stop_tokens=tuple(body.stop_token_ids or ()),
            ignore_end=bool(body.ignore_eos),
            top_logprobs=0 if body.logprobs is None and only_prompt else body.logprobs,
            echo_logprobs=bool(body.echo) and (body.logprobs is not None or only_prompt),
            timeout_seconds=timeout_seconds,
        )
    except ConfigError as error:
        raise bad_request(str(error), "prompt") from None
