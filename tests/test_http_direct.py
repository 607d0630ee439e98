"""The short way from the engine's thread to the socket: nothing is lost, doubled or out of order."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from http_samples import FakeEngine, Running, serving

from gulliver.serve.openai import events as stream
from gulliver.serve.openai import socket_writer as direct

WORDS = "".join(f"{number} " for number in range(700))
BODY = {"model": "fake", "prompt": "a", "stream": True, "max_tokens": 10**6}


class Counted(direct.Direct):
    """Counts what went the short way, and what was left over."""

    wrote = 0
    left = 0

    def write(self, body: bytes) -> bytes:
        rest = super().write(body)
        Counted.wrote += not rest
        Counted.left += bool(rest)
        return rest


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    Counted.wrote = Counted.left = 0
    monkeypatch.setattr(direct, "Direct", Counted)


def read_all(server: Running, body: dict[str, Any], pause: float, buffer: int | None = None) -> bytes:
    """The whole answer, read after `pause` seconds; `buffer`: bytes that the client's kernel holds."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    with socket.socket() as connection:
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        received = b""
        time.sleep(pause)
        while not received.endswith(b"0\r\n\r\n"):
            part = connection.recv(65536)
            assert part, "the connection ended before the answer"
            received += part
    return unchunked(received.partition(b"\r\n\r\n")[2])


def unchunked(body: bytes) -> bytes:
    """The content of a chunked body; every chunk must be framed exactly."""
    content = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        assert body[count : count + 2] == b"\r\n"
        if count == 0:
            assert body[2:] == b""
            return content
        content, body = content + body[:count], body[count + 2 :]


def texts(content: bytes, choices: int = 1) -> list[str]:
    lines = content.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    found = [""] * choices
    for line in lines[:-2]:
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        found[choice["index"]] += choice["text"]
    return found


@pytest.mark.parametrize("choices", [1, 3])
def test_a_client_that_keeps_up_is_served_the_short_way(choices: int) -> None:
    engine = FakeEngine(answer=lambda request: WORDS[:400], pause=0.001)
    with serving(engine) as server:
        content = read_all(server, {**BODY, "n": choices}, 0)
    assert texts(content, choices) == [WORDS[:400]] * choices
    assert Counted.wrote > 300 * choices


@pytest.mark.parametrize("choices", [1, 2])
def test_a_client_that_reads_slowly_loses_nothing(choices: int) -> None:
    engine = FakeEngine(answer=lambda request: WORDS, context=10**6, pause=0.0001)  # slow enough to begin the short way
    with serving(engine, send_buffer=8192) as server:
        content = read_all(server, {**BODY, "n": choices}, 0.6, buffer=16384)
    assert texts(content, choices) == [WORDS] * choices
    assert Counted.left > 0, "the socket never filled, so this tested nothing"


def test_choices_that_end_at_different_times() -> None:
    engine = FakeEngine(answer=lambda request: WORDS[: 40 * (1 + (request.sampling.seed or 0))], pause=0.001)
    with serving(engine) as server:
        found = texts(read_all(server, {**BODY, "n": 5, "seed": 0}, 0), 5)
    assert found == [WORDS[: 40 * (1 + turn)] for turn in range(5)]


def test_without_a_short_way_the_loop_writes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "direct_of", lambda scope: None)
    with serving(FakeEngine(answer=lambda request: WORDS, context=10**6), send_buffer=8192) as server:
        content = read_all(server, {**BODY, "n": 2}, 0.3, buffer=16384)
    assert texts(content, 2) == [WORDS] * 2 and Counted.wrote == 0


def test_the_sockets_are_let_go() -> None:
    with serving(FakeEngine(answer=lambda request: "x" * 20)) as server:
        read_all(server, BODY, 0)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            read_all(server, BODY, 0)
        time.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_socket_is_not_closed_within_a_write() -> None:
    """Another client's connection may have the descriptor at once."""
    ours, theirs = socket.socketpair()
    begun, go_on, calls = threading.Event(), threading.Event(), []

    def send(data: bytes) -> int:
        begun.set()
        assert go_on.wait(10)
        calls.append("sent")
        return len(data)

    with ours, theirs:
        way: Any = direct.Direct(None, os.dup(ours.fileno()))
        kept, way._socket = way._socket, SimpleNamespace(send=send, close=lambda: calls.append("closed"))
        threads = [threading.Thread(target=way.write, args=(b"one",)), threading.Thread(target=way.close)]
        threads[0].start()
        assert begun.wait(10)
        threads[1].start()
        threads[1].join(0.1)
        go_on.set()
        for thread in threads:
            thread.join(10)
        assert calls == ["sent", "closed"]
        kept.close()
        way._socket = kept
        assert way.write(b"two") == b""


def test_a_request_that_ended_leads_to_nothing() -> None:
    """Else it would wait for the collector of cycles, which comes late."""
    scopes: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope[direct.SEND] is send
        scopes.append(scope)
        if scope["fails"]:
            raise RuntimeError("the application failed")

    async def send(message: Any) -> None:
        raise AssertionError(message)

    wrapped = direct.KeepsSend(app)
    asyncio.run(wrapped({"type": "http", "fails": False}, send, send))
    with pytest.raises(RuntimeError, match="the application failed"):
        asyncio.run(wrapped({"type": "http", "fails": True}, send, send))
    assert [direct.SEND in scope for scope in scopes] == [False, False]
