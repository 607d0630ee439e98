"""One attack is one coroutine that opens one connection and says what became of it; most only differ in their bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

HUNG, CLOSED = -1, 0
"""Outcomes that are no HTTP status: nothing came in time; the server closed without an answer."""
HANG_SECONDS = 40.0  # a slow body has 30
Act = Callable[[int, int], Awaitable[int]]
"""(port, number of this attempt) -> status, CLOSED or HUNG."""
Bytes = bytes | Callable[[int], bytes]

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A whole HTTP request; underscores in names of headers stand for hyphens, "" leaves one out."""
    fields = {"host": "localhost", "connection": "close", "content_type": "application/json"}
    fields |= {"content_length": str(len(body))} if body or method == "POST" else {}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in {**fields, **headers}.items() if value]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


def posted(path: str, body: Any, **headers: str) -> bytes:
    """A request with a JSON body; bytes are sent as they are."""
    return request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)


@contextlib.asynccontextmanager
async def connected(port: int, buffer: int | None = None) -> Any:
    """(reader, writer) of a new connection; `buffer`: bytes that the client's kernel holds. Closed roughly."""
    sock = socket.socket()
    sock.setblocking(False)
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    try:
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**16)
    except BaseException:
        sock.close()
        raise
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def status_of(reader: asyncio.StreamReader) -> int:
    """The status of an answer that is read to the end of the connection."""
    first, size = b"", 0
    try:
        while part := await reader.read(65536):
            first, size = first or part, size + len(part)
    except ConnectionError:
        pass
    words = first.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else CLOSED


async def written(writer: asyncio.StreamWriter, data: bytes) -> bool:
    """Send; False when the server closed meanwhile."""
    try:
        for place in range(0, len(data), 2**18):
            writer.write(data[place : place + 2**18])
            await writer.drain()
    except ConnectionError:
        return False
    return True


def sends(data: Bytes) -> Act:
    """Sends bytes and reads what comes, to the end."""

    async def act(port: int, number: int) -> int:
        async with connected(port) as (reader, writer):
            reading = asyncio.ensure_future(status_of(reader))  # meanwhile: an early answer must not be lost
            await written(writer, data(number) if callable(data) else data)
            return await reading

    return act


def drips(head: bytes, drop: bytes, seconds: float = 0.05, times: int = 10**6) -> Act:
    """Sends a beginning and then a drop every few moments, until the server has enough of it."""

    async def act(port: int, number: int) -> int:
        async with connected(port) as (reader, writer):
            reading = asyncio.ensure_future(status_of(reader))
            alive, left = await written(writer, head), times
            while alive and left and not reading.done():
                alive, left = await written(writer, drop), left - 1
                await asyncio.sleep(seconds)
            return await reading

    return act


def floods(head: bytes, flood: bytes, most_bytes: int) -> Act:
    """Sends a beginning and then as much as the server takes, at most `most_bytes`."""

    async def act(port: int, number: int) -> int:
        async with connected(port) as (reader, writer):
            reading = asyncio.ensure_future(status_of(reader))
            alive, sent = await written(writer, head), 0
            while alive and sent < most_bytes and not reading.done():
                alive, sent = await written(writer, flood), sent + len(flood)
            return await reading

    return act


def leaves(data: bytes, after_bytes: int = 1) -> Act:
    """Sends a request and breaks the connection when the answer has begun."""

    async def act(port: int, number: int) -> int:
        async with connected(port) as (reader, writer):
            await written(writer, data)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await reader.readexactly(after_bytes)
            return CLOSED

    return act


def holds(data: bytes, connections: int, seconds: float = 1.0) -> Act:
    """Opens many connections, sends the same on each, keeps them for a while and asks for health meanwhile."""

    async def act(port: int, number: int) -> int:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(connections):
                try:
                    _, writer = await stack.enter_async_context(connected(port))
                    await written(writer, data)
                except ConnectionError:
                    continue
            await asyncio.sleep(seconds)
            return await sends(request("GET", "/healthz"))(port, number)

    return act


def never_reads(data: bytes, seconds: float = 1.0) -> Act:
    """Asks for a long answer and reads none of it for a while."""

    async def act(port: int, number: int) -> int:
        async with connected(port, buffer=4096) as (reader, writer):
            reader._transport.pause_reading()
            await written(writer, data)
            await asyncio.sleep(seconds)
            return CLOSED

    return act


async def tried(act: Act, port: int, number: int, seconds: float = HANG_SECONDS) -> int:
    """The outcome of one attempt within a time."""
    try:
        return await asyncio.wait_for(act(port, number), seconds)
    except TimeoutError:
        return HUNG
    except OSError:
        return CLOSED
