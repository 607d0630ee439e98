"""What a connection may take before, between and after its requests: bytes, seconds, and a place among the others.

uvicorn bounds none of it. Its parser keeps a header of any length, at a cost that grows with the square of it; a client
that sends half a head, or never reads its answer, is waited for without end. All of this comes before a key is asked
for, so it is bounded here: a small addition to uvicorn's protocol that costs an honest request a few comparisons.

Seconds are looked after by one timer of the server that passes all connections twice a second.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import resource
import socket
import uuid
from collections import Counter
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gulliver.serve import logs
from gulliver.serve.errors import ApiError, bad_request
from gulliver.serve.state import Settings, State

TICK_SECONDS = 0.5
MAX_PIPELINED = 32  # requests that one connection may send ahead
RESERVE = 64  # connections beyond the most, so that health is still told
FEED_BYTES = 2**15  # that are parsed before anything is counted
MAX_PIECES = 2**13  # chunks of one body, each of which costs more than its bytes
MARKS_BYTES = 2**18  # what a body may take beyond its own bytes: sizes and names of chunks, headers behind it
LINGER_SECONDS = 2.0  # a refused client may go on sending; closing at once could destroy the answer on its way
LINGER_BYTES = 2**20
UNREAD_SECONDS = 5.0  # for the rest of a body whose request is answered already


class Crowd:
    """All connections of one server. `half_open`: no whole head yet; `idle`: between two requests; oldest first."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.settings: Settings = state.settings
        self.half_open: dict[Connection, None] = {}
        self.idle: dict[Connection, None] = {}
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = min(self.settings.max_connections, descriptors * 3 // 4)
        self._ticking = False

    def protocol(self, **given: Any) -> Connection:
        """uvicorn's `http_protocol_class`."""
        return Connection(self, **given)

    def enter(self, connection: Connection) -> None:
        """A new one. When there is no place, the oldest that waits makes room; where none waits, the new one goes."""
        state = self.state
        state.connections += 1
        state.crowded = state.connections > self.most
        if state.crowded:
            victim = next(itertools.chain(self.half_open, self.idle), None)
            if victim is not None:
                self.forget(victim)
                victim.transport.abort()
            elif state.connections > self.most + RESERVE:
                connection.transport.abort()
                return
        self.waits(connection)
        if not self._ticking:
            self._ticking = True
            connection.loop.call_later(TICK_SECONDS, self._tick, connection.loop, connection.connections)

    def waits(self, connection: Connection) -> None:
        """For the rest of a head, from now."""
        connection.end = connection.loop.time() + self.settings.head_seconds
        self.idle.pop(connection, None)
        self.half_open[connection] = None

    def forget(self, connection: Connection) -> None:
        """It waits for no head any more."""
        connection.end = math.inf
        self.half_open.pop(connection, None)
        self.idle.pop(connection, None)

    def leave(self, connection: Connection) -> None:
        """It is closed."""
        self.forget(connection)
        self.state.connections -= 1
        self.state.crowded = self.state.connections > self.most

    def _tick(self, loop: asyncio.AbstractEventLoop, connections: set[Any]) -> None:
        now = loop.time()
        for connection in [one for one in connections if one.end < now or one.stalled < now]:
            connection.late(now)
        if len(self.half_open) > self.settings.max_half_open:
            self._trim()
        self._ticking = bool(connections)
        if self._ticking:
            loop.call_later(TICK_SECONDS, self._tick, loop, connections)

    def _trim(self) -> None:
        """Close the oldest half-open connections of each address beyond the most it may have.

        New ones are not refused, and have had up to TICK_SECONDS: an honest client's head comes with its connection.
        """
        counts = Counter(connection.origin for connection in self.half_open)
        for connection in list(self.half_open):
            if counts[connection.origin] > self.settings.max_half_open:
                counts[connection.origin] -= 1
                self.forget(connection)
                connection.transport.abort()


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with bounds. `end`, `stalled`: when it is late, on the event loop's clock, in seconds."""

    def __init__(self, crowd: Crowd, **given: Any) -> None:
        super().__init__(**given)
        self.crowd = crowd
        self.end = self.stalled = math.inf
        self.unread = 0  # bytes of an answer that waited when the client began to be slow
        self.origin: Any = None  # the client's address; of IPv6 the half that is given to one customer
        self.taken = 0  # bytes of the message that arrives now, but for what came with the end of the one before
        self.pieces = self.carried = 0  # of its body: parts and bytes
        self.in_head = True  # no head is whole
        self.refusal: ApiError | None = None  # why the parser was stopped
        self.deaf = False  # what still comes is not read
        self.answering: RequestResponseCycle | None = None  # the request that runs; `cycle` is the one that came last

    # ---- what uvloop calls -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client is not None else ""
        wide = ":" in address and not address.startswith("::ffff:")
        self.origin = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8] if wide else address
        self.crowd.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.leave(self)
        super().connection_lost(exc)
        if self._answers():  # with requests sent ahead, uvicorn tells the last one only
            assert self.answering is not None
            self.answering.disconnected = True
            self.answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if len(data) <= FEED_BYTES:
            self._feed(data)
            return
        for place in range(0, len(data), FEED_BYTES):
            self._feed(data[place : place + FEED_BYTES])

    def _feed(self, data: bytes) -> None:
        """Parse at most FEED_BYTES, and look what became of them."""
        self.taken += len(data)
        if self.deaf:
            if self.taken > LINGER_BYTES:
                self.transport.abort()
            return
        assert self.parser is not None, "data after the end of a connection"
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # no other protocol is spoken: answered as if it was not asked for
            self._listen_no_more()
            return
        except httptools.HttpParserError:
            self.refuse(self.refusal or bad_request("this is not valid HTTP/1.1", code="invalid_http"))
            return
        if not self.taken:
            return  # the usual case: a whole request
        settings = self.crowd.settings
        if len(self.headers or ()) > settings.max_headers or (self.in_head and self.taken > settings.max_head_bytes):
            self.refuse(self._head_too_long())
        elif self.in_head and not self._answers() and self not in self.crowd.half_open:
            self.crowd.waits(self)
        elif self.taken - min(self.carried, settings.max_body_bytes) > settings.max_head_bytes + MARKS_BYTES:
            self.refuse(_too_long("the body and the marks of its chunks are too long"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.transport.get_write_buffer_size()
        self.stalled = self.loop.time() + self.crowd.settings.write_seconds

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stalled = math.inf

    # ---- what the parser calls ---------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        settings = self.crowd.settings
        if len(self.headers) > settings.max_headers or (
            self.taken > settings.max_head_bytes
            and len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > settings.max_head_bytes
        ):
            raise self._stop(self._head_too_long())
        if len(self.pipeline) >= MAX_PIPELINED:
            raise self._stop(bad_request("too many requests were sent ahead", code="too_many_pipelined"))
        self.in_head = False
        self.crowd.forget(self)
        super().on_headers_complete()
        self.headers = []  # those behind a body in chunks are not the request's

    def on_body(self, body: bytes) -> None:
        self.pieces += 1
        self.carried += len(body)
        if self.pieces > MAX_PIECES:
            raise self._stop(_too_long("the body comes in too many chunks; send it in larger ones"))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.in_head = True
        self.taken = self.pieces = self.carried = 0
        super().on_message_complete()
        if self.cycle.response_complete:
            self._rest()

    def _stop(self, refusal: ApiError) -> ApiError:
        self.refusal = refusal
        return refusal

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.answering = cycle
        super()._start_asgi_task(cycle, app)

    def _answers(self) -> bool:
        """Whether a request is being answered."""
        return self.answering is not None and not self.answering.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answers():
            return
        now = self.loop.time()
        if self.transport.is_closing() or self.flow.write_paused:
            self.end = now + self.crowd.settings.timeout_seconds  # for the client to read what is left
        elif not self.in_head:
            self.end = now + UNREAD_SECONDS
        else:
            self._rest()

    def _rest(self) -> None:
        """Until the next request; part of its head may be here already."""
        if self.taken:
            self.crowd.waits(self)
            return
        self.end = self.loop.time() + self.timeout_keep_alive
        self.crowd.idle[self] = None

    # ---- the end -----------------------------------------------------------------------------------------------------

    def late(self, now: float) -> None:
        """A time is over."""
        waiting = self.transport.get_write_buffer_size()
        if self.stalled < now <= self.end and waiting < self.unread:  # it reads, if slowly
            self.unread, self.stalled = waiting, now + self.crowd.settings.write_seconds
            return
        if self.stalled < now or self.deaf or self.transport.is_closing() or not self.in_head:
            self.transport.abort()
        elif self in self.crowd.half_open and self.taken:
            message = "the head of the request did not arrive in time"
            self.refuse(ApiError(HTTPStatus.REQUEST_TIMEOUT, message, code="request_timeout"))
        else:
            self.crowd.forget(self)
            self.transport.close()
            self.end = now + LINGER_SECONDS

    def _head_too_long(self) -> ApiError:
        settings = self.crowd.settings
        message = f"the head of the request has over {settings.max_headers} headers or {settings.max_head_bytes} bytes"
        return ApiError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, code="headers_too_long")

    def _listen_no_more(self) -> None:
        """Answer what runs, then close."""
        self.deaf, self.taken = True, 0
        if self._answers():
            self.cycle.keep_alive = False
        else:
            self.transport.close()
            self.end = self.loop.time() + LINGER_SECONDS

    def refuse(self, error: ApiError) -> None:
        """Answer what is no request, or not to its end, and close; in the midst of another answer, close at once."""
        self.crowd.forget(self)
        self.deaf, self.taken = True, 0
        self.end = self.loop.time() + LINGER_SECONDS
        call, status = uuid.uuid4().hex, error.status_code
        self.crowd.state.metrics.requests.labels("other", "other", str(status), "").inc()
        logs.event("request", request=call, method="other", path="other", status=status)
        running = self.answering
        if running is not None and not running.response_complete:
            if running.response_started or running is not self.cycle:
                self.transport.close()
                return
            running.disconnected = True  # it waits for its body, which does not come; what it says is not sent
            running.message_event.set()
        body = error.body()
        lines = {"content-type": "application/json", "content-length": len(body), "x-request-id": call}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.transport.write(STATUS_LINE[status] + head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.write_eof()


def _too_long(message: str) -> ApiError:
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="body_too_long")
