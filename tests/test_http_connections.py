"""What a connection may take: heads, seconds, bytes that are no body, and a place among other connections."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from http_samples import FakeEngine, Running, serving
from test_http_limits import until

from gulliver.serve import connections
from gulliver.serve.connections import MAX_PIPELINED
from gulliver.serve.errors import ErrorAnswer
from gulliver.serve.keys import KeyRing, add_key
from gulliver.serve.state import Settings

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
BODY = b'{"model":"fake","prompt":"ab","max_tokens":1000}'


def opened(server: Running, data: bytes = b"", buffer: int | None = None) -> socket.socket:
    """A connection on which `data` is sent; `buffer`: bytes that the client's kernel holds."""
    connection = socket.socket()
    connection.settimeout(20)
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    connection.sendall(data)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found


def answer(server: Running, data: bytes) -> tuple[int, dict[str, Any]]:
    """(status, error) of what the server says before it closes."""
    with opened(server, data) as connection:
        text = rest(connection)
    head, _, body = text.partition(b"\r\n\r\n")
    assert b"connection: close" in head and b"x-request-id: " in head, text[:200]
    return int(head.split()[1]), ErrorAnswer.model_validate_json(body, strict=True).model_dump()["error"]


def is_well(server: Running) -> bool:
    with server.client() as client:
        return client.get("/healthz").status_code == 200


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    settings = Settings(head_seconds=0.2, write_seconds=0.5, max_half_open=8, max_body_bytes=100_000)
    with serving(FakeEngine(answer=lambda request: "ok"), settings=settings) as running:
        yield running


# ---- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 40_000,
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 101 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"x" * 40_000 + b": y\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"\r\n" * 20_000,
    ],
    ids=["value", "whole", "number", "name", "path", "nothing"],
)
def test_a_head_that_is_too_long_is_a_431(server: Running, head: bytes) -> None:
    status, error = answer(server, head)
    assert status == 431 and error["code"] == "headers_too_long" and "32768 bytes" in error["message"]
    assert is_well(server)


def test_a_head_is_bounded_before_a_key_is_asked_for(tmp_path: Any) -> None:
    add_key(tmp_path / "keys.json", "ann")
    with serving(FakeEngine(), keys=KeyRing(tmp_path / "keys.json", print)) as server, opened(server) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nx: ")
        with pytest.raises(OSError):
            for _ in range(64):
                connection.sendall(b"a" * 2**20)
        assert is_well(server)


def test_a_head_of_the_longest_kind_is_taken(server: Running) -> None:
    head = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + b"".join(
        b"x-%02d: %s\r\n" % (number, b"a" * 300) for number in range(99)
    )
    with opened(server, head + b"\r\n") as connection:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_a_head_that_does_not_come_is_a_408(server: Running) -> None:
    status, error = answer(server, b"GET /healthz HTTP/1.1\r\nhost:")
    assert status == 408 and error["code"] == "request_timeout"
    with opened(server) as connection:
        assert rest(connection) == b""  # nothing was asked
    with opened(server, HEALTH) as connection:  # the second head of a kept connection
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.sendall(b"GET /hea")
        assert b"HTTP/1.1 408" in rest(connection)


def test_a_head_that_comes_in_pieces_is_taken(server: Running) -> None:
    with opened(server) as connection:
        for place in range(0, len(HEALTH), 9):
            connection.sendall(HEALTH[place : place + 9])
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"CONNECT evil:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nhost: localhost\r\n\r\n",
        POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
        POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        POST + b"content-length: " + b"9" * 30 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_is_a_400_in_the_shape_of_all_errors(server: Running, data: bytes) -> None:
    status, error = answer(server, data)
    assert status == 400 and error["code"] == "invalid_http"


# ---- bodies ----------------------------------------------------------------------------------------------------------


def test_marks_of_chunks_are_bounded(server: Running) -> None:
    status, error = answer(server, CHUNKED + b"1;" + b"x" * 500_000)
    assert status == 413 and error["code"] == "body_too_long"
    status, _ = answer(server, CHUNKED + b"1\r\n{\r\n0\r\n" + b"x: y\r\n" * 50_000)
    assert status == 431
    status, error = answer(server, CHUNKED + b"1\r\n \r\n" * 50_000)
    assert status == 413 and "larger ones" in error["message"]
    status, _ = answer(server, HEALTH[:-2] + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 50_000)
    assert status == 413 and is_well(server)  # of a body that nobody reads too


def test_a_chunk_that_is_no_number_is_answered(server: Running) -> None:
    status, error = answer(server, CHUNKED + b"zz\r\n")
    assert status == 400 and error["code"] == "invalid_http"
    until(lambda: server.state.active == 0)


def test_headers_after_a_body_are_not_those_of_the_request(server: Running) -> None:
    data = CHUNKED + b"%x\r\n%s\r\n0\r\nauthorization: Bearer x\r\n\r\n" % (len(BODY), BODY)
    with opened(server, data) as connection:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_a_body_that_nobody_reads_does_not_hold_the_connection(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.1)
    with opened(server, b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nx") as connection:
        assert rest(connection).startswith(b"HTTP/1.1 405")


def test_another_protocol_is_not_spoken(server: Running) -> None:
    for other in (b"h2c", b"websocket"):
        with opened(server, HEALTH[:-2] + b"connection: upgrade\r\nupgrade: %s\r\n\r\n" % other) as connection:
            assert b'{"status":"ok"}' in (text := rest(connection)) and b"connection: close" in text


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_a_client_that_never_reads_is_closed() -> None:
    engine = FakeEngine(answer=lambda request: "x" * 20_000_000, context=10**9)
    body = b'{"model":"fake","prompt":"a","max_tokens":20000000,"stream":true}'
    with serving(engine, settings=Settings(write_seconds=0.2), send_buffer=4096) as server:
        data = POST + b"content-length: %d\r\n\r\n" % len(body) + body
        with opened(server, data, buffer=4096):
            until(lambda: server.state.active == 1)
            until(lambda: server.state.active == 0)
        assert engine.cancelled == 1


def test_a_stream_with_a_request_behind_it_ends_with_its_client() -> None:
    engine = FakeEngine(answer=lambda request: "long answer " * 400, pause=0.01)
    body = b'{"model":"fake","prompt":"a","max_tokens":4000,"stream":true}'
    with serving(engine) as server:
        with opened(server, POST + b"content-length: %d\r\n\r\n" % len(body) + body + HEALTH) as connection:
            connection.recv(10)
        until(lambda: engine.cancelled == 1)
        until(lambda: server.state.active == 0)


def test_requests_sent_ahead_are_answered_in_order_and_bounded(server: Running) -> None:
    with opened(server, HEALTH * 4) as connection:
        text = b""
        while text.count(b'{"status":"ok"}') < 4:
            text += connection.recv(65536)
    with opened(server, HEALTH * 5000) as connection:
        assert rest(connection).count(b"HTTP/1.1") <= MAX_PIPELINED + 1
    assert is_well(server)


# ---- many connections ------------------------------------------------------------------------------------------------


def test_half_open_connections_of_an_address_are_bounded() -> None:
    with serving(FakeEngine(), settings=Settings(max_half_open=8)) as server, contextlib.ExitStack() as stack:
        many = [stack.enter_context(opened(server, b"GET / HT")) for _ in range(60)]
        until(lambda: server.state.connections <= 8)
        assert is_well(server)
        many[-1].sendall(b"TP/1.1\r\nhost: localhost\r\n\r\n")  # the newest are kept
        assert many[-1].recv(15) == b"HTTP/1.1 200 OK"


def test_connections_that_wait_make_room() -> None:
    with serving(FakeEngine(), settings=Settings(max_connections=8)) as server, contextlib.ExitStack() as stack:
        for _ in range(60):
            connection = stack.enter_context(opened(server, HEALTH))
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert server.state.connections <= 9


def test_a_crowded_server_refuses_work_and_tells_its_health() -> None:
    engine = FakeEngine(answer=lambda request: "long answer " * 400, pause=0.01)
    body = b'{"model":"fake","prompt":"a","max_tokens":4000,"stream":true}'
    with serving(engine, settings=Settings(max_connections=4)) as server, contextlib.ExitStack() as stack:
        for _ in range(4):
            data = POST + b"content-length: %d\r\n\r\n" % len(body) + body
            stack.enter_context(opened(server, data)).recv(10)
        with server.client() as client:
            refused = client.post("/v1/completions", json=json.loads(body))
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "too_many_connections"
            assert refused.headers["connection"] == "close" and refused.headers["retry-after"]
            assert client.get("/healthz").status_code == 200 and client.get("/metrics").status_code == 200
        stack.close()
        until(lambda: server.state.active == 0)


def test_connections_are_counted_back() -> None:
    with serving(FakeEngine()) as server:
        with contextlib.ExitStack() as stack:
            for data in (b"", HEALTH, b"GET", b"\x00", HEALTH * 3):
                stack.enter_context(opened(server, data))
        until(lambda: server.state.connections == 0)
        began = time.monotonic()
        assert is_well(server) and time.monotonic() - began < 10
