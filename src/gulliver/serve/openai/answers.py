"""Answers of /v1/chat/completions and /v1/completions as bytes: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, ClassVar

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gulliver.runtime.batching.records import Piece, TokenChoice
from gulliver.serve.errors import gone
from gulliver.serve.openai.generation import Generation, failure_of
from gulliver.serve.openai.request_schemas import Called, ChatRequest, CompletionRequest, GenerationFields
from gulliver.serve.openai.tools import ToolReader, usable
from gulliver.serve.state import RequestRecord, ServedModel

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold chunks back
]
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; server-sent events when `stream` is true, ended by `data: [DONE]`",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
INLINE_TOKENS = 256  # answers with more tokens are written in a thread, so that others are not delayed
LOWEST = -9999.0  # how a probability of zero is written: JSON cannot hold infinity


class AnswerWriter(ABC):
    """Writes the answer to one request, whole or as server-sent events. `count` comes before `closing` and `whole`."""

    prefix: ClassVar[str]  # of the answer's id
    kinds: ClassVar[tuple[str, str]]  # `object` of a whole answer, and of an event

    def __init__(self, model: ServedModel, call: RequestRecord, body: GenerationFields) -> None:
        self.text = model.engine.text
        self._call = call
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.per_prompt = body.n or 1
        # system_fingerprint: equal for equal weights on an equal backend
        self._about = {
            "id": f"{self.prefix}-{call.id}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": f"{(model.artifact_id or 'unnamed')[:12]}-{model.answerer.backend}",
        }

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """The choices before the first piece, each an event."""

    @abstractmethod
    def added(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The choices that a piece adds to the stream, each an event."""

    def part(self, piece: Piece) -> tuple[str, Sequence[TokenChoice]]:
        """(text, tokens) of a piece that are shown."""
        return piece.text, piece.tokens

    @abstractmethod
    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], finish: str) -> dict[str, Any]:
        """A choice of a whole answer."""

    def count(self, run: Generation) -> None:
        """Write what the run used into the record of its request."""
        call, pieces = self._call, [piece for piece in run.last if piece is not None]
        firsts = [piece for piece in run.last[:: self.per_prompt] if piece is not None]  # each prompt counts once
        call.choices = len(run.requests)
        call.prompt_tokens = sum(piece.prompt_tokens for piece in firsts)
        call.cached_tokens = sum(piece.cached_tokens for piece in firsts)
        call.completion_tokens = sum(piece.completion_tokens for piece in pieces)
        call.first_token = run.first_token
        reasons = {(piece.finish or "").split(":")[0] for piece in pieces}
        call.finish = "gone" if run.gone else ",".join(sorted(reasons))

    def event(self, *choices: dict[str, Any], usage: dict[str, Any] | None = None) -> bytes:
        """One event of the stream."""
        event = {"object": self.kinds[1], **self._about, "choices": choices}
        if self._include_usage:
            event["usage"] = usage
        return b"data: " + orjson.dumps(event) + b"\n\n"

    def chunk(self, index: int, piece: Piece) -> bytes:
        """What a piece adds to the stream; an error in the place of the last event when the piece ends by one."""
        choices, failure = self.added(index, piece), failure_of(piece)
        if failure is None:
            return b"".join(map(self.event, choices))
        return b"".join([*map(self.event, choices[:-1]), b"data: ", failure.body(), b"\n\n"])

    def closing(self) -> bytes:
        """The last events: usage where it was asked for, and the end mark."""
        return self.event(usage=self._usage()) + DONE if self._include_usage else DONE

    def whole(self, pieces: Sequence[tuple[int, Piece]], choices: int) -> bytes:
        """The answer in one. ApiError when a completion failed."""
        texts, finishes = [""] * choices, [""] * choices
        tokens: list[list[TokenChoice]] = [[] for _ in texts]
        for index, piece in pieces:
            if (failure := failure_of(piece)) is not None:
                raise failure
            text, shown = self.part(piece)
            texts[index] += text
            tokens[index] += shown
            finishes[index] = piece.finish or ""
        rows = [self.choice(index, *row) for index, row in enumerate(zip(texts, tokens, finishes, strict=True))]
        return orjson.dumps({"object": self.kinds[0], **self._about, "choices": rows, "usage": self._usage()})

    def _usage(self) -> dict[str, Any]:
        call = self._call
        return {
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
            "total_tokens": call.prompt_tokens + call.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": call.cached_tokens},
        }


class ChatAnswer(AnswerWriter):
    """What a model says, and the functions that it calls."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, model: ServedModel, call: RequestRecord, body: ChatRequest) -> None:
        super().__init__(model, call, body)
        self._logprobs = bool(body.logprobs)
        self._tools = [tool.function.name for tool in usable(body)]
        self._readers: dict[int, ToolReader] = {}

    def opening(self) -> list[dict[str, Any]]:
        """The role in every choice."""
        return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(self.per_prompt)]

    def added(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The text of a piece, at the end the calls and the end."""
        text, calls = self._read(index, piece.text, last=piece.finish is not None)
        found = []
        if text or (self._logprobs and piece.tokens):
            found.append(self._delta(index, {"content": text}, self._logprobs_json(piece.tokens)))
        if calls:
            rows = [{"index": number, **_call_json(call)} for number, call in enumerate(calls)]
            found.append(self._delta(index, {"tool_calls": rows}))
        if piece.finish is not None:
            found.append(self._delta(index, {}, finish="tool_calls" if calls else piece.finish))
        return found

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], finish: str) -> dict[str, Any]:
        """A choice of a whole answer."""
        text, calls = self._read(index, text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": list(map(_call_json, calls))}
        row = {"index": index, "message": message, "logprobs": self._logprobs_json(tokens)}
        return {**row, "finish_reason": "tool_calls" if calls else finish}

    def _read(self, index: int, text: str, *, last: bool) -> tuple[str, list[Called]]:
        """(text that is certain to be no call, at the end the calls)."""
        if not self._tools:
            return text, []
        reader = self._readers.setdefault(index, ToolReader(self._tools))
        text = reader.feed(text)
        rest, calls = reader.finish() if last else ("", [])
        return text + rest, calls

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> Any:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs_json(self, tokens: Sequence[TokenChoice]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        rows = []
        for choice in tokens:
            rivals = [_token_json(self.text.token_bytes(token), logprob) for token, logprob in choice.top]
            rows.append({**_token_json(choice.text, choice.logprob), "top_logprobs": rivals})
        return {"content": rows}


def _token_json(text: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": text.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(text)}


def _call_json(call: Called) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call.model_dump()}


class CompletionAnswer(AnswerWriter):
    """`echoes` holds each choice's prompt as text; it is shown where the request asks for it."""

    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def __init__(self, model: ServedModel, call: RequestRecord, body: CompletionRequest, echoes: Sequence[str]) -> None:
        super().__init__(model, call, body)
        self._logprobs = body.logprobs is not None
        self._echoes = echoes if body.echo else [""] * len(echoes)
        self._only_prompt = body.max_tokens == 0
        self._offsets = [0] * len(echoes)

    def opening(self) -> list[dict[str, Any]]:
        """The prompts, where they are repeated and have no logprobs; those come with the first piece."""
        return [self._row(index, text) for index, text in enumerate(self._echoes) if text and not self._logprobs]

    def part(self, piece: Piece) -> tuple[str, Sequence[TokenChoice]]:
        """(text, tokens) of a piece that are shown; the tokens of a repeated prompt are among them."""
        return ("", piece.prompt) if self._only_prompt else (piece.text, piece.prompt + piece.tokens)

    def added(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The text of a piece, and its end."""
        text, tokens = self.part(piece)
        if piece.prompt and self._logprobs:
            text = self._echoes[index] + text
        logprobs = self._logprobs_json(index, tokens) if tokens and self._logprobs else None
        found = [self._row(index, text, logprobs)] if text or logprobs else []
        return found if piece.finish is None else [*found, self._row(index, "", finish=piece.finish)]

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], finish: str) -> dict[str, Any]:
        """A choice of a whole answer, after its prompt where that is repeated."""
        logprobs = self._logprobs_json(index, tokens) if self._logprobs else None
        return self._row(index, self._echoes[index] + text, logprobs, finish)

    def _row(self, index: int, text: str, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs_json(self, index: int, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        """The older form of logprobs: lists side by side. `text_offset` counts characters of the choice's text."""
        offsets = []
        for choice in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += sum(byte & 0xC0 != 0x80 for byte in choice.text)
        return {
            "tokens": [_shown(choice.text) for choice in tokens],
            "token_logprobs": [None if choice.logprob is None else _finite(choice.logprob) for choice in tokens],
            "top_logprobs": [self._top(choice) for choice in tokens],
            "text_offset": offsets,
        }

    def _top(self, choice: TokenChoice) -> dict[str, float] | None:
        """The likeliest tokens, and the one that was taken; two that look alike keep the likelier."""
        if choice.logprob is None:
            return None
        rows = {_shown(choice.text): _finite(choice.logprob)}
        for token, logprob in choice.top:
            shown, value = _shown(self.text.token_bytes(token)), _finite(logprob)
            rows[shown] = max(value, rows.get(shown, LOWEST))
        return rows


def _shown(text: bytes) -> str:
    """A token as text; one that is a part of a character as OpenAI writes it: bytes:\\xe2\\x82."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _finite(logprob: float | None) -> float:
    """A logprob as JSON can hold it."""
    return LOWEST if logprob is None else max(float(logprob), LOWEST)


class EventStream(Response):
    """The streamed answer of a run that has started. When the client goes away the run is cancelled."""

    media_type = "text/event-stream"

    def __init__(self, run: Generation, writer: AnswerWriter) -> None:
        super().__init__()
        self._run = run
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run, writer = self._run, self._writer
        watch = asyncio.ensure_future(run.watch(receive))
        try:
            await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": HEADERS})
            body = b"".join(map(writer.event, writer.opening()))
            while True:
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                items = await run.take()
                if not items:
                    break
                body = b"".join([writer.chunk(index, piece) for index, piece in items])
            writer.count(run)
            await send({"type": "http.response.body", "body": writer.closing(), "more_body": False})
        finally:
            writer.count(run)
            watch.cancel()
            run.cancel()


async def answered(run: Generation, request: HttpRequest, writer: AnswerWriter) -> Response:
    """Start the run and answer: as a stream, or in one once it has ended.

    ApiError when the engine does not take it, and when the client disconnected before the end.
    """
    run.start()
    if run.streamed:
        return EventStream(run, writer)
    watch = asyncio.ensure_future(run.watch(request.receive))
    try:
        pieces = await run.take()
    finally:
        writer.count(run)
        watch.cancel()
        run.cancel()
    if run.gone:
        raise gone()
    size = sum(len(piece.tokens) + len(piece.prompt) for _, piece in pieces)
    if size > INLINE_TOKENS:
        body = await asyncio.to_thread(writer.whole, pieces, len(run.requests))
    else:
        body = writer.whole(pieces, len(run.requests))
    return Response(body, HTTPStatus.OK, media_type="application/json")
