"""A short way for streamed tokens: the engine's thread writes them to the socket itself.

At batch one a token takes a few milliseconds on all cores. Waking the event loop for each costs an event, a context
switch and a turn of the loop on a core that the arithmetic wants; a non-blocking `send` from the thread that has the
token costs a fraction of it. The loop still owns the connection: it writes the headers, whatever the socket does not
take at once, and the end.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

SEND = "gulliver.send"


class Direct:
    """The connection of one streamed answer. `write` belongs to the engine's thread, the rest to the loop."""

    def __init__(self, cycle: Any, descriptor: int) -> None:
        self._cycle = cycle
        self._socket = socket.socket(fileno=descriptor)
        self._closing = threading.Lock()

    def write(self, body: bytes) -> bytes:
        """Send one chunk; returns what the socket did not take. A connection that broke takes everything."""
        framed = b"%x\r\n%b\r\n" % (len(body), body)
        with self._closing:  # a descriptor closed within `send` may be another client's at once
            try:
                return framed[self._socket.send(framed) :]
            except BlockingIOError:
                return framed
            except OSError:
                return b""  # the loop learns of it by itself, and cancels

    def is_flushed(self) -> bool:
        """Whether the kernel has all that the loop wrote, and chunks may follow."""
        cycle = self._cycle
        return bool(cycle.chunked_encoding) and cycle.transport.get_write_buffer_size() == 0

    def write_rest(self, rest: bytes) -> None:
        """Write what `write` left, through the loop."""
        self._cycle.transport.write(rest)

    def close(self) -> None:
        """Let go of the socket; the connection itself stays the loop's."""
        with self._closing:
            self._socket.close()


class KeepsSend:
    """The outermost layer: leaves the server's own `send` in the scope, before others wrap it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[SEND] = send
        try:
            await self._app(scope, receive, send)
        finally:
            del scope[SEND]  # it leads to the server's own record of the request, which holds the scope


def direct_of(scope: Scope) -> Direct | None:
    """The short way for the connection behind uvicorn's `send`; None where there is none: another server, or TLS."""
    cycle: Any = getattr(scope.get(SEND), "__self__", None)
    transport = getattr(cycle, "transport", None)
    if transport is None or not hasattr(cycle, "chunked_encoding"):
        return None
    found = transport.get_extra_info("socket")
    if found is None or transport.get_extra_info("ssl_object") is not None:
        return None
    try:
        return Direct(cycle, os.dup(found.fileno()))
    except OSError:
        return None  # no descriptor is left: the loop writes
