"""Bodies are read by orjson, which is strict: no lone surrogates, no NaN, no bottomless nesting.

Python's lock is held while the objects of a body are made, and nothing else of the process runs meanwhile. A text of
megabytes is one object, made in milliseconds; a million empty lists in as many bytes take seconds. So what a long body
holds is counted before it is read, by numpy in a thread, which lets others run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import orjson
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from gulliver.runtime.batching.records import QueueFull
from gulliver.serve.errors import bad_request, refused
from gulliver.serve.threads import Threads

SHORT_BYTES = 64 * 2**10  # a body to here is read at once
PIECE_BYTES = 128 * 2**10  # counted at a time: Python's lock is held while backslashes are taken out
MAX_PARTS = 2**17  # texts (keys too), lists and objects of a body: four thousand messages with calls have half of it
MAX_ITEMS = 2**20  # numbers (tokens) and all else that commas part
_COUNTER = Threads(1)


class JsonRequest(Request):
    """A request whose JSON is read by orjson."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) > SHORT_BYTES:
                try:
                    await asyncio.wrap_future(_COUNTER.submit(check_size, body))
                except QueueFull as error:
                    raise refused(error) from None
            self._json = orjson.loads(body)
        return self._json


class JsonRoute(APIRoute):
    """A route with such requests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return read


def check_size(body: bytes) -> None:
    """ApiError for JSON with too many parts."""
    texts = parts = items = inside = 0
    for piece in _pieces(body):
        plain = np.frombuffer(piece.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
        quotes = plain == ord('"')  # those that are left are around texts
        within = np.bitwise_xor.accumulate(quotes.view(np.uint8)) ^ inside
        outside, inside = within == 0, int(within[-1]) if len(within) else inside
        texts += np.count_nonzero(quotes)
        parts += sum(np.count_nonzero((plain == ord(sign)) & outside) for sign in "[{")
        items += np.count_nonzero((plain == ord(",")) & outside)
    for count, most, what in (
        (texts // 2 + parts, MAX_PARTS, "texts, lists and objects"),
        (items, MAX_ITEMS, "values"),
    ):
        if count > most:
            raise bad_request(
                f"the body has {count:,} {what}; a request may have at most {most:,}", code="body_too_long"
            )


def _pieces(body: bytes) -> Iterator[bytes]:
    """The body in pieces, none of which ends between a backslash and what it escapes."""
    at = 0
    while at < len(body):
        piece = body[at : at + PIECE_BYTES]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2 and len(piece) > 1:
            piece = piece[:-1]
        yield piece
        at += len(piece)
