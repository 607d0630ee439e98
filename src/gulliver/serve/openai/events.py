"""Answers on their way out: whole, or as server-sent events written straight to the server's `send`."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gulliver.serve.errors import gone
from gulliver.serve.openai.answers import AnswerWriter
from gulliver.serve.openai.generation import Generation

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
