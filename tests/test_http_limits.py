"""Limits, keys, cancelling and the end of a server."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from http_samples import FakeEngine, Running, served, serving

from gulliver.runtime.batching.records import EngineClosed, Piece, Request
from gulliver.serve import app, json_route, logs, process
from gulliver.serve.errors import ApiError
from gulliver.serve.keys import KeyRing, add_key, remove_key
from gulliver.serve.openai.generation import IN_FLIGHT, Bridge, Generation
from gulliver.serve.state import Settings

BODY = {"model": "fake", "prompt": "ab", "max_tokens": 1000}
LONG = "long answer " * 40


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def slow() -> FakeEngine:
    """One token in 10 ms, for five seconds."""
    return FakeEngine(answer=lambda request: LONG, pause=0.01)


@contextlib.contextmanager
def post_and_leave(server: Running, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request whose client stays until the block ends, then breaks the connection."""
    port = int(server.url.rsplit(":", 1)[1])
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(data)}"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        yield connection


# ---- the queue, the body, the time -----------------------------------------------------------------------------------


def test_a_full_queue_is_a_429_that_says_when_to_come_again(slow: FakeEngine) -> None:
    slow.slots, slow.queue = 1, 0
    with serving(slow) as server, server.client() as client, post_and_leave(server, BODY):
        until(lambda: slow.requests)
        response = client.post("/v1/completions", json=BODY)
        assert response.status_code == 429 and response.json()["error"]["code"] == "queue_full"
        assert response.headers["retry-after"] == "3"


def test_a_long_list_of_prompts_does_not_fill_the_queue() -> None:
    engine = FakeEngine(answer=lambda request: "x", slots=2, queue=3)
    with serving(engine) as server, server.client() as client:
        body = client.post("/v1/completions", json={**BODY, "prompt": ["a"] * 40}).json()
        assert [choice["text"] for choice in body["choices"]] == ["x"] * 40


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_a_413(chunked: bool) -> None:
    engine = FakeEngine()
    with serving(engine, settings=Settings(max_body_bytes=1000)) as server, server.client() as client:
        data = json.dumps({**BODY, "prompt": "x" * 2000}).encode()
        content = iter([data[:500], data[500:]]) if chunked else data
        response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413 and response.json()["error"]["type"] == "invalid_request_error"
        assert response.headers["connection"] == "close"
        assert client.post("/v1/completions", json=BODY).status_code == 200
    assert len(engine.requests) == 1


def test_what_large_bodies_leave_is_given_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr("gulliver.serve.middleware.give_back_freed_memory", given.append)
    monkeypatch.setattr("gulliver.serve.middleware.GIVE_BACK_SECONDS", 0.1)
    with serving(FakeEngine()) as server, server.client() as client:
        client.post("/v1/completions", json=BODY)
        for _ in range(3):
            client.post("/v1/completions", json={**BODY, "prompt": "x" * 500_000})
        until(lambda: given)
        time.sleep(0.2)
        assert 1 <= len(given) <= 3


def test_a_body_that_does_not_come_is_a_408() -> None:
    with serving(FakeEngine(), settings=Settings(body_seconds=0.1)) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "100")
        connection.endheaders(b"{")
        response = connection.getresponse()
        assert response.status == 408 and "error" in json.loads(response.read())
        connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(stream: bool, slow: FakeEngine) -> None:
    with serving(slow, settings=Settings(timeout_seconds=0.1)) as server, server.client() as client:
        response = client.post("/v1/completions", json={**BODY, "stream": stream})
        if stream:
            assert '"code":"timeout"' in response.text and response.text.endswith("data: [DONE]\n\n")
        else:
            assert response.status_code == 504 and response.json()["error"]["type"] == "timeout_error"


def test_the_time_is_of_the_whole_request(slow: FakeEngine) -> None:
    with serving(slow, settings=Settings(timeout_seconds=0.5)) as server, server.client() as client:
        began = time.monotonic()
        assert client.post("/v1/completions", json={**BODY, "n": 128}).status_code == 504
        assert time.monotonic() - began < 2  # eight times 16 completions, each of which would run for five seconds


# ---- clients that go away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_cancelled(stream: bool, slow: FakeEngine) -> None:
    with serving(slow) as server:
        with post_and_leave(server, {**BODY, "stream": stream, "n": 3}) as connection:
            until(lambda: len(slow.requests) == 3)
            if stream:
                connection.recv(10)
        until(lambda: slow.cancelled == 3)
        until(lambda: server.state.active == 0)
        with server.client() as client:
            assert client.get("/healthz").status_code == 200


def test_waiting_prompts_of_a_client_that_went_are_never_submitted(slow: FakeEngine) -> None:
    with serving(slow) as server:
        with post_and_leave(server, {**BODY, "prompt": ["a"] * 50}):
            until(lambda: len(slow.requests) == 16)
        until(lambda: server.state.active == 0)
    assert len(slow.requests) == 16


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ring(tmp_path: Path) -> tuple[str, Path]:
    path = tmp_path / "keys.json"
    return add_key(path, "ann", requests_per_minute=3, tokens_per_minute=10_000), path


def headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_only_who_has_a_key_is_served(ring: tuple[str, Path]) -> None:
    key, path = ring
    problems: list[str] = []
    with serving(FakeEngine(), keys=KeyRing(path, problems.append)) as server, server.client() as client:
        for wrong in ({}, headers("x"), headers(key[:-1]), headers("gk-ключ"), {"authorization": f"Basic {key}"}):
            encoded = {name: value.encode() for name, value in wrong.items()}
            response = client.post("/v1/completions", json=BODY, headers=encoded)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models").status_code == 401 and client.get("/api/models/fake").status_code == 401
        for free in ("/healthz", "/readyz", "/metrics", "/"):
            assert client.get(free).status_code == 200
        response = client.post("/v1/completions", json=BODY, headers=headers(key))
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-remaining-requests"] == "2"


def test_requests_and_tokens_a_minute(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    few = add_key(path, "few", requests_per_minute=2)
    short = add_key(path, "short", tokens_per_minute=20)
    engine = FakeEngine(answer=lambda request: LONG)
    with serving(engine, keys=KeyRing(path, print)) as server, server.client() as client:
        assert [client.post("/v1/completions", json=BODY, headers=headers(few)).status_code for _ in range(3)] == [
            200,
            200,
            429,
        ]
        assert client.post("/v1/completions", json=BODY, headers=headers(short)).status_code == 200
        response = client.post("/v1/completions", json=BODY, headers=headers(short))
        assert response.status_code == 429 and "tokens per minute" in response.json()["error"]["message"]
        debt = (len(LONG) + 2 - 20) / 20 * 60
        assert debt <= int(response.headers["retry-after"]) <= debt + 5


def test_a_key_that_is_removed_stops_working(ring: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gulliver.serve.keys.REREAD_SECONDS", 0.0)
    key, path = ring
    problems: list[str] = []
    with serving(FakeEngine(), keys=KeyRing(path, problems.append)) as server, server.client() as client:
        assert client.get("/v1/models", headers=headers(key)).status_code == 200
        good = path.read_text()
        path.write_text("{")
        assert client.get("/v1/models", headers=headers(key)).status_code == 200  # the last keys that could be read
        assert len(problems) == 1 and "not valid JSON" in problems[0]
        path.write_text(good)
        remove_key(path, "ann")
        assert client.get("/v1/models", headers=headers(key)).status_code == 401


# ---- the end ---------------------------------------------------------------------------------------------------------


def drained(server: Running, hurried: asyncio.Event | None = None) -> threading.Thread:
    """Begin to drain as the signal handler does; the returned thread ends when the drain does."""
    thread = threading.Thread(target=lambda: asyncio.run(process.drain(server.state, hurried or asyncio.Event())))
    thread.start()
    until(lambda: server.state.draining)
    return thread


def test_what_a_closed_engine_refuses_is_given_up() -> None:

    async def order() -> list[tuple[int, str | None]]:
        delivered: list[Callable[[Piece], None]] = []

        def submit(request: Request, deliver: Callable[[Piece], None]) -> Any:
            if len(delivered) == IN_FLIGHT:
                raise EngineClosed("closed")
            delivered.append(deliver)
            return SimpleNamespace(cancel=lambda: None)

        engine = SimpleNamespace(submit=submit)
        run = Generation(engine, [Request((1,), max_tokens=1)] * (IN_FLIGHT + 2), Bridge(), True, 60)
        run.start()
        for deliver in delivered:
            deliver(Piece("", finish="stop"))
            await asyncio.sleep(0)
        taken = []
        while items := await run.take():
            taken += [(index, piece.finish) for index, piece in items]
        return taken

    ended = [(index, "stop") for index in range(IN_FLIGHT)]
    assert sorted(asyncio.run(order())) == [*ended, (IN_FLIGHT, "cancelled"), (IN_FLIGHT + 1, "cancelled")]


def test_a_drain_lets_streams_finish_and_refuses_new_work() -> None:
    engine = FakeEngine(answer=lambda request: "twenty tokens, slowly", pause=0.02)
    with serving(engine) as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            thread = drained(server)
            with server.client() as other:
                assert other.get("/readyz").status_code == 503 and other.get("/healthz").status_code == 200
                refused = other.post("/v1/completions", json=BODY)
                assert refused.status_code == 503 and refused.headers["retry-after"]
            assert list(lines)[-2] == "data: [DONE]"
        thread.join(5)
        assert not thread.is_alive() and engine.cancelled == 0


def test_a_drain_that_takes_too_long_tells_the_clients(slow: FakeEngine) -> None:
    with serving(slow, settings=Settings(grace_seconds=0.1)) as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            drained(server).join(10)
            text = "\n".join(lines)
        assert '"code":"shutting_down"' in text and text.strip().endswith("data: [DONE]")


# ---- logs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    kept = [
        (logging.getLogger(name), logging.getLogger(name).handlers[:]) for name in ("gulliver.serve", "uvicorn.error")
    ]
    logs.configure(stream)
    yield stream
    for logger, handlers in kept:
        logger.handlers[:] = handlers
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


def test_logs_are_json_without_prompts_answers_or_keys(log: io.StringIO, ring: tuple[str, Path]) -> None:
    key, path = ring
    engine = FakeEngine(answer=lambda request: "the answer is hidden")
    with serving(engine, keys=KeyRing(path, print)) as server, server.client(headers=headers(key)) as client:
        body = {**BODY, "prompt": "the secret prompt"}
        request = client.post("/v1/completions", json=body).headers["x-request-id"]
        client.post("/v1/completions", json={**body, "stream": True})
        client.get("/healthz")
        client.get("/some/secret/path?secret=1")

        def broken(request: Any) -> str:
            raise RuntimeError("secret")

        engine.answer = broken
        client.post("/v1/completions", json=body)
    rows = [json.loads(line) for line in log.getvalue().splitlines()]
    assert "secret" not in log.getvalue() and "hidden" not in log.getvalue() and key not in log.getvalue()
    assert [row["event"] for row in rows] == ["request", "request", "request", "failure", "request"]
    first = rows[0]
    assert (first["request"], first["key"], first["model"], first["status"]) == (request, "ann", "fake", 200)
    assert (first["prompt_tokens"], first["completion_tokens"], first["finish"]) == (17, 20, "stop")
    assert first["first_token_milliseconds"] <= first["milliseconds"] and first["time"].endswith("Z")
    assert rows[1]["completion_tokens"] == 20 and rows[1]["first_token_milliseconds"] > 0
    assert rows[2]["path"] == "other" and rows[3]["error"] == "RuntimeError" and rows[4]["status"] == 500


def test_a_connection_is_kept_for_the_next_request() -> None:
    with serving(FakeEngine()) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
        for stream in (True, False, True):
            body = json.dumps({**BODY, "stream": stream})
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200 and (b"data: [DONE]" if stream else b"rld!") in response.read()
            assert connection.sock is not None, "the server closed the connection"
        connection.close()


def test_httpx_knows_the_streams_end(slow: FakeEngine) -> None:
    slow.answer = lambda request: "ok"
    with serving(slow) as server, httpx.Client() as client:
        assert client.post(f"{server.url}/v1/completions", json={**BODY, "stream": True}).text.count("data:") == 4


BOMBS = {
    "content": b'{"model":"fake","messages":[{"role":"user","content":[' + b",".join([b"0"] * 100_000) + b"]}]}",
    "parts": b'{"model":"fake","messages":[{"role":"user","content":[' + b",".join([b"{}"] * 400_000) + b"]}]}",
    "calls": b'{"model":"fake","messages":[{"role":"user","tool_calls":[' + b",".join([b"[]"] * 100_000) + b"]}]}",
    "tools": b'{"model":"fake","tools":[' + b",".join([b"0"] * 100_000) + b"]}",
    "unknown": b'{"model":"fake",' + b",".join(b'"k%d":0' % number for number in range(60_000)) + b"}",
    "nested": b'{"model":"fake","stream_options":{' + b",".join(b'"k%d":0' % n for n in range(60_000)) + b"}}",
    "biases": b'{"model":"fake","logit_bias":{' + b",".join(b'"%d":"x"' % n for n in range(60_000)) + b"}}",
    "modalities": b'{"model":"fake","modalities":[' + b",".join([b'"a"'] * 100_000) + b"]}",
    "values": b'{"model":"fake","messages":[' + b",".join([b"0"] * 1_100_000) + b"]}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_body_of_faults_is_refused_by_its_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    first = app.from_validation
    monkeypatch.setattr(
        app, "from_validation", lambda problems, fields: counts.append(len(problems)) or first(problems, fields)
    )
    with serving(FakeEngine()) as server, server.client() as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/chat/completions", content=BOMBS[name], headers=headers)
    assert answer.status_code == 400 and len(answer.content) < 1000
    assert all(count < 10 for count in counts), counts


def test_what_a_long_body_holds_is_counted_as_a_parser_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_route, "PIECE_BYTES", 5)
    value = {'a"\\': ["\\", '\\"[{,', [], {}, 1, 2, {"é": "[,{"}], "b": "\\\\\\"}
    parts, items = 12, 7  # texts with keys, lists and objects; commas
    for most, fits in (((parts, items), True), ((parts - 1, items), False), ((parts, items - 1), False)):
        monkeypatch.setattr(json_route, "MAX_PARTS", most[0])
        monkeypatch.setattr(json_route, "MAX_ITEMS", most[1])
        with contextlib.nullcontext() if fits else pytest.raises(ApiError):
            json_route.check_size(json.dumps(value, ensure_ascii=False).encode())


def test_a_model_that_never_reads_its_requests_holds_up_no_other() -> None:
    stuck, go = FakeEngine(name="stuck"), threading.Event()
    stuck.text.encode_chat = lambda *given, **options: [1] * (1 + go.wait(60))
    models = [served(stuck, "stuck"), served(FakeEngine(), "fake")]
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    try:
        with (
            serving(models=models, settings=Settings(timeout_seconds=1.0)) as server,
            server.client() as client,
            ThreadPoolExecutor(6) as pool,
        ):
            post = partial(client.post, "/v1/chat/completions")
            asked = [pool.submit(post, json={**body, "model": "stuck"}) for _ in range(6)]
            time.sleep(0.3)
            assert post(json={**body, "model": "fake"}).status_code == 200
            assert client.get("/healthz").status_code == 200
            assert [one.result().status_code for one in asked] == [504] * 6
    finally:
        go.set()


def test_an_engine_that_says_nothing_cannot_hold_a_request_past_its_time() -> None:
    engine = FakeEngine()
    engine.submit = lambda request, deliver: SimpleNamespace(cancel=lambda: None)
    with serving(engine, settings=Settings(timeout_seconds=0.3)) as server, server.client() as client:
        assert client.post("/v1/completions", json=BODY).status_code == 504
        streamed = client.post("/v1/completions", json={**BODY, "stream": True}).text
        assert "timed out" in streamed and streamed.endswith("data: [DONE]\n\n")
        engine.alive = False
        assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200
