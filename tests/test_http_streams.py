"""Streams on the wire: nothing is lost, doubled or out of order, however slowly a client reads."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

import pytest
from http_samples import FakeEngine, Running, serving

WORDS = "".join(f"{number} " for number in range(700))
BODY = {"model": "fake", "prompt": "a", "stream": True, "max_tokens": 10**6}


def read_all(server: Running, body: dict[str, Any], pause: float, buffer: int | None = None) -> bytes:
    """The whole answer, read after `pause` seconds; `buffer`: bytes that the client's kernel holds."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(data)}"
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
def test_every_token_is_an_event_of_its_own(choices: int) -> None:
    engine = FakeEngine(answer=lambda request: WORDS[:100], pause=0.01)
    with serving(engine) as server:
        content = read_all(server, {**BODY, "n": choices}, 0)
    assert texts(content, choices) == [WORDS[:100]] * choices
    assert content.count(b"data: ") == 101 * choices + 1


@pytest.mark.parametrize("choices", [1, 2])
def test_a_client_that_reads_slowly_loses_nothing(choices: int) -> None:
    engine = FakeEngine(answer=lambda request: WORDS, context=10**6)
    with serving(engine, send_buffer=8192) as server:
        content = read_all(server, {**BODY, "n": choices}, 0.6, buffer=16384)
    assert texts(content, choices) == [WORDS] * choices


def test_choices_that_end_at_different_times() -> None:
    engine = FakeEngine(answer=lambda request: WORDS[: 40 * (1 + (request.sampling.seed or 0))], pause=0.001)
    with serving(engine) as server:
        found = texts(read_all(server, {**BODY, "n": 5, "seed": 0}, 0), 5)
    assert found == [WORDS[: 40 * (1 + turn)] for turn in range(5)]


def test_the_sockets_are_let_go() -> None:
    with serving(FakeEngine(answer=lambda request: "x" * 20)) as server:
        read_all(server, BODY, 0)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            read_all(server, BODY, 0)
        time.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
