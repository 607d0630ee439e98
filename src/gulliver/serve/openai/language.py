"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.records import Request
from gulliver.runtime.sampling import Sampling
from gulliver.serve.errors import bad_request
from gulliver.serve.json_route import JsonRoute
from gulliver.serve.openai import tools
from gulliver.serve.openai.answers import STREAMS, ChatAnswer, CompletionAnswer, answered
from gulliver.serve.openai.generation import Bridge, Generation
from gulliver.serve.openai.request_schemas import MAX_PROMPTS, ChatRequest, CompletionRequest, GenerationFields, Tool
from gulliver.serve.openai.response_schemas import ChatCompletion, Completion
from gulliver.serve.state import ServedModel, State, record_of

DEFAULT_TOKENS = 16
LARGEST_SEED = 2**63 - 1
SMALLEST_TEMPERATURE = 1e-3  # below it the likeliest token is taken: dividing logits by less may overflow
SMALLEST_TOP_P = 1e-9  # what top_p = 0, which OpenAI allows, means: the likeliest token alone


def router(state: State) -> APIRouter:
    """The routes, for one server."""
    routes, bridge = APIRouter(route_class=JsonRoute, tags=["text"], responses=STREAMS), Bridge()

    @routes.post("/v1/chat/completions", operation_id="create_chat_completion", response_model=ChatCompletion)
    async def chat(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer a conversation, whole or streamed."""
        model = state.model(body.model, "generate")
        call = record_of(request)
        call.model = model.name
        _check_chat(body)
        asked = await state.prepared(call, model.threads, _chat_request, body, model, call.owner)
        if tools.forced(body) or (body.response_format is not None and body.response_format.type != "text"):
            asked = replace(asked, grammar=await state.prepared(call, model.compilers, _grammar, body, model))
        run = Generation(model.engine, _repeated([asked], body.n or 1), bridge, bool(body.stream), state.left(call))
        return await answered(run, request, ChatAnswer(model, call, body))

    @routes.post("/v1/completions", operation_id="create_completion", response_model=Completion)
    async def complete(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue a text, or several, whole or streamed."""
        model = state.model(body.model, "generate")
        call = record_of(request)
        call.model = model.name
        _check_completion(body)
        rows, times = rows_of(body.prompt, "prompt"), body.n or 1
        if len(rows) * times > MAX_PROMPTS:
            message = f"{len(rows) * times} completions were requested; a request may ask for at most {MAX_PROMPTS}"
            raise bad_request(message, "n")
        prompts = await state.prepared(call, model.threads, _completion_requests, body, rows, model, call.owner)
        asked = _repeated([one for one, _ in prompts], times)
        run = Generation(model.engine, asked, bridge, bool(body.stream), state.left(call))
        echoes = [text for _, text in prompts for _ in range(times)]
        return await answered(run, request, CompletionAnswer(model, call, body, echoes))

    return routes


def _check_chat(body: ChatRequest) -> None:
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


def _chat_request(body: ChatRequest, model: ServedModel, owner: str) -> Request:
    """Render and tokenize. ApiError when the template refuses."""
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
    if not tokens:
        raise bad_request("the prompt is empty; give at least one token", "messages")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return replace(
        _engine_request(body, tokens, model, owner),
        max_tokens=_fitted(tokens, asked, model, "messages"),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _grammar(body: ChatRequest, model: ServedModel) -> Any:
    grammars, form, required = model.engine.grammars, body.response_format, tools.forced(body)
    try:
        if required:
            return grammars.json_schema(tools.call_schema(required))
        if form is not None and form.type == "json_schema":
            return grammars.json_schema(form.json_schema.schema_)
        return grammars.json_object() if form is not None and form.type == "json_object" else None
    except ConfigError as error:
        raise bad_request(str(error), "tools" if required else "response_format") from None
    except RecursionError:
        raise bad_request("the schema is nested too deep", "tools" if required else "response_format") from None


def _check_completion(body: CompletionRequest) -> None:
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


def _completion_requests(
    body: CompletionRequest, rows: Sequence[str | list[int]], model: ServedModel, owner: str
) -> list[tuple[Request, str]]:
    """(request, text of the prompt) of every prompt; the text of tokens where they are repeated."""
    prompts = _prompts(rows, model, bool(body.echo))
    return [(_completion_request(body, tokens, model, owner), text) for tokens, text in prompts]


def _completion_request(body: CompletionRequest, tokens: Sequence[int], model: ServedModel, owner: str) -> Request:
    asked = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    only_prompt = asked == 0  # an engine gives no answer of no tokens; then the prompt's logprobs are all it does
    return replace(
        _engine_request(body, tokens, model, owner),
        max_tokens=_fitted(tokens, asked, model, "prompt"),
        top_logprobs=0 if body.logprobs is None and only_prompt else body.logprobs,
        echo_logprobs=bool(body.echo) and (body.logprobs is not None or only_prompt),
    )


def _engine_request(body: GenerationFields, prompt: Sequence[int], model: ServedModel, owner: str) -> Request:
    """What chats and completions state alike. ApiError for a bias on a token that does not exist."""
    biases, vocabulary = [], model.engine.decoder.vocabulary
    for token, bias in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < vocabulary):
            message = f"logit_bias names token {token[:32]!r}; ids go from 0 to {vocabulary - 1}"
            raise bad_request(message, "logit_bias")
        biases.append((int(token), float(bias)))
    temperature = _or(body.temperature, 1.0)
    sampling = Sampling(
        temperature=temperature if temperature >= SMALLEST_TEMPERATURE else 0.0,
        top_k=max(0, body.top_k or 0),
        top_p=max(_or(body.top_p, 1.0), SMALLEST_TOP_P),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=tuple(biases),
        seed=None if body.seed is None else body.seed & LARGEST_SEED,
    )
    return Request(
        prompt=tuple(prompt),
        sampling=sampling,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_tokens=tuple(body.stop_token_ids or ()),
        ignore_end=bool(body.ignore_eos),
        owner=owner,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _fitted(prompt: Sequence[int], max_tokens: int | None, model: ServedModel, param: str) -> int | None:
    """`max_tokens`, at most what the context leaves. ApiError when the prompt leaves room for no token at all."""
    context = model.engine.context
    room = context - len(prompt)
    if room < (0 if max_tokens == 0 else 1):
        raise bad_request(
            f"the prompt has {len(prompt)} tokens; with its answer it must fit the context of {context}; shorten it",
            param,
            "context_length_exceeded",
        )
    return None if max_tokens is None else min(max_tokens, room)


def _repeated(requests: Sequence[Request], times: int) -> list[Request]:
    """Each request `times` times, one after the other, each with a random stream of its own."""
    found = []
    for request in requests:
        seed = request.sampling.seed
        for turn in range(times):
            changed = seed if seed is None or turn == 0 else (seed + turn) & LARGEST_SEED
            found.append(replace(request, sampling=replace(request.sampling, seed=changed)) if turn else request)
    return found


def rows_of(given: str | Sequence[str] | Sequence[int] | Sequence[list[int]], param: str) -> list[Any]:
    """The texts, or lists of tokens, of a field that may hold one or several. ApiError for an empty list."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise bad_request(f"{param} is an empty list; give at least one text or token", param)
    return list(given)
