"""Server-sent events, written straight to the server's `send`: no queue, lock or copy between a piece and its write."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gulliver.runtime.batching.records import Piece
from gulliver.serve.openai.generation import Generation
from gulliver.serve.openai.socket_writer import Direct, direct_of

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold chunks back
]
CLIENT_CLOSED = 499
"""The status that is logged when a client went away before its answer; nobody receives it."""

INLINE_TOKENS = 256
"""Answers with more tokens whose logprobs may have to be written are written in a thread; others' go on meanwhile."""


class Writer(Protocol):
    """Turns pieces into bytes: ChatAnswer, CompletionAnswer. `count` comes before `closing` and `whole`."""

    def opening(self, choices: int) -> bytes: ...
    def chunk(self, index: int, piece: Piece) -> bytes: ...
    def count(self, run: Generation) -> None: ...
    def closing(self) -> bytes: ...
    def whole(self, run: Generation, pieces: Sequence[tuple[int, Piece]]) -> bytes: ...


class EventStream(Response):
    """The streamed answer of a run that has started. When the client goes away the run is cancelled."""

    media_type = "text/event-stream"

    def __init__(self, run: Generation, writer: Writer) -> None:
        super().__init__()
        self._run = run
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self._run
        watch = asyncio.ensure_future(run.watch(receive))
        direct = direct_of(scope)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await self._send(send, self._writer.opening(len(run.requests)), direct)
            if direct is not None:
                run.shorten(partial(_write, direct, self._writer))
            while items := await run.take():
                await self._send(send, self._taken(items, direct), direct)
            self._writer.count(run)
            await send({"type": "http.response.body", "body": self._writer.closing(), "more_body": False})
        finally:
            self._writer.count(run)
            watch.cancel()
            run.cancel()
            if direct is not None:
                direct.close()

    def _taken(self, items: list[tuple[int, Any]], direct: Direct | None) -> bytes:
        """The bytes of what came; a rest of the short way is always the first of all and goes ahead."""
        parts = []
        for index, item in items:
            if isinstance(item, bytes):
                assert direct is not None and not parts, "only the short way leaves a rest, with nothing before it"
                direct.write_rest(item)
            else:
                parts.append(self._writer.chunk(index, item))
        return b"".join(parts)

    async def _send(self, send: Send, body: bytes, direct: Direct | None) -> None:
        """Write a chunk, and look soon whether the kernel has it."""
        came = self._run.came
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if direct is not None:
            asyncio.get_running_loop().call_soon(_look, self._run, direct, came)


def _write(direct: Direct, writer: Writer, index: int, piece: Piece) -> bytes:
    """In the engine's thread."""
    body = writer.chunk(index, piece)
    return direct.write(body) if body else b""


def _look(run: Generation, direct: Direct, came: int) -> None:
    if direct.is_flushed():
        run.flushed(came)


async def whole(run: Generation, request: HttpRequest, writer: Writer) -> Response:
    """The answer of a run in one, once it has ended; 499 when the client went away before."""
    watch = asyncio.ensure_future(run.watch(request.receive))
    try:
        pieces = await run.finish()
    finally:
        writer.count(run)
        watch.cancel()
        run.cancel()
    if run.gone:
        return Response(status_code=CLIENT_CLOSED)
    size = sum(len(piece.tokens) + len(piece.prompt) for _, piece in pieces)
    work = partial(writer.whole, run, pieces)
    body = await asyncio.to_thread(work) if size > INLINE_TOKENS else work()
    return Response(body, HTTPStatus.OK, media_type="application/json")


async def answered(run: Generation, request: HttpRequest, writer: Writer, *, streamed: bool) -> Response:
    """Start the run and answer as asked. ApiError when the engine does not take it."""
    run.start()
    return EventStream(run, writer) if streamed else await whole(run, request, writer)
