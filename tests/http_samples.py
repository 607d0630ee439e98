"""An engine without a model, and a server around it, for the tests of the HTTP side.

Its tokens are bytes. It answers with a text that a test chooses, one token a piece, from a thread of its own, and keeps
the promises of runtime/batching/records.py: one last piece, a bounded queue, cancelling at any time.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from gulliver.core.errors import ConfigError, DataError
from gulliver.runtime.batching.counters import Counters
from gulliver.runtime.batching.records import EngineClosed, Piece, QueueFull, Request, TokenChoice
from gulliver.serve import process
from gulliver.serve.app import make_state
from gulliver.serve.keys import KeyRing
from gulliver.serve.state import ServedModel, Settings, State
from gulliver.tasks.answerer import Answerer

END = 256
VOCABULARY = 257


class ByteText:
    """Text whose tokens are bytes; the chat template is a line a message."""

    def __init__(self, shows_tools: bool = True) -> None:
        self.shows_tools = shows_tools
        self.seen: list[tuple[Sequence[Mapping[str, Any]], Any]] = []

    def encode(self, text: str, special: bool = True) -> list[int]:
        del special
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < END).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < END else b"<end>"

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
        return "".join(f"{row['role']}: {row['content']}\n" for row in messages) + (f"{tools}\n" if tools else "")

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        if messages[0]["content"] == "refuse me":
            raise ConfigError("the model's chat template refuses these messages")
        self.seen.append((messages, tools))
        return self.encode(self.render_chat(messages, tools))


class FakeGrammars:
    """Remembers what was asked for."""

    def __init__(self) -> None:
        self.schemas: list[Any] = []

    def json_object(self) -> Any:
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Any) -> Any:
        if schema.get("type") == "nonsense":
            raise ConfigError("the JSON schema cannot be used: unknown type")
        self.schemas.append(schema)
        return SimpleNamespace(schema=schema)


@dataclass
class Job:
    """A request under way."""

    request: Request
    deliver: Callable[[Piece], None]
    tokens: list[int]
    began: float
    sent: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeEngine:
    """`answer` gives the text for a request; `pause` seconds lie between steps."""

    answer: Callable[[Request], str] = lambda request: "Hello, wörld!"
    pause: float = 0.0
    queue: int = 256
    slots: int = 16
    context: int = 512
    fail_after: int | None = None  # tokens
    name: str = "fake"
    text: Any = field(default_factory=ByteText)
    grammars: FakeGrammars = field(default_factory=FakeGrammars)
    counters: Counters = field(default_factory=Counters)
    requests: list[Request] = field(default_factory=list)
    cancelled: int = 0
    closed: bool = False
    alive: bool = True

    def __post_init__(self) -> None:
        self.decoder = SimpleNamespace(vocabulary=VOCABULARY)
        self._jobs: list[Job] = []
        self._lock = threading.Condition()
        self._stop = False
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Job:
        with self._lock:
            if self.closed:
                raise EngineClosed("closed")
            waiting = len(self._jobs) - self.slots
            if waiting >= self.queue:
                self.counters.rejected += 1
                raise QueueFull(waiting, 2.5)
            text = self.answer(request)
            for stop in request.stop:
                text = text.partition(stop)[0]
            job = Job(request, deliver, list(text.encode()), time.monotonic())
            self.requests.append(request)
            self.counters.requests += 1
            self._jobs.append(job)
            self._lock.notify()
        return job

    def stats(self) -> dict[str, float]:
        gauges = {"requests_running": float(min(len(self._jobs), self.slots)), "requests_waiting": 0.0}
        return gauges | {"cache_blocks_used": 1.0, "cache_blocks_total": 8.0} | self.counters.numbers()

    def histograms(self) -> dict[str, Any]:
        return self.counters.histograms()

    def drain(self, seconds: float) -> bool:
        self.closed = True
        end = time.monotonic() + seconds
        while self._jobs and time.monotonic() < end:
            time.sleep(0.005)
        ended = not self._jobs
        for job in list(self._jobs):
            job.cancel()
        return ended

    def close(self) -> None:
        self.closed = True
        self._stop = True
        with self._lock:
            self._lock.notify()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._jobs or self._stop)
                if self._stop:
                    return
                running = self._jobs[: self.slots]
            if self.pause:
                time.sleep(self.pause)
            for job in running:
                last = self._step(job)
                if last:
                    with self._lock:
                        self._jobs.remove(job)

    def _step(self, job: Job) -> bool:
        request, now = job.request, time.monotonic()
        limit = min(len(job.tokens), request.max_tokens if request.max_tokens is not None else 1 << 30)
        numbers = {"prompt_tokens": len(request.prompt), "cached_tokens": len(request.prompt) // 2}
        if request.echo_logprobs and job.sent == 0:
            job.deliver(Piece("", prompt=tuple(self._choice(request, token) for token in request.prompt), **numbers))
        if job.cancelled:
            self.cancelled += 1
            finish: str | None = "cancelled"
        elif request.timeout_seconds is not None and now - job.began > request.timeout_seconds:
            finish = "timeout"
        elif self.fail_after is not None and job.sent >= self.fail_after:
            finish = "error: the model's numbers are wrong"
        elif job.sent >= limit:
            finish = "length" if job.sent < len(job.tokens) else "stop"
        else:
            finish = None
        if finish is not None:
            self.counters.finish(finish, now, job.began)
            job.deliver(Piece("", finish=finish, completion_tokens=job.sent, **numbers))
            return True
        end = job.sent + 1
        while end < len(job.tokens) and job.tokens[end] & 0xC0 == 0x80:  # no half characters
            end += 1
        tokens = job.tokens[job.sent : end]
        job.sent = end
        self.counters.completion_tokens += len(tokens)
        choices = tuple(self._choice(request, token) for token in tokens)
        job.deliver(Piece(bytes(tokens).decode(), choices, completion_tokens=job.sent, **numbers))
        return False

    def _choice(self, request: Request, token: int) -> TokenChoice:
        count = request.top_logprobs
        if count is None:
            return TokenChoice(token, bytes([token]))
        top = tuple(((token + turn) % 256, -0.5 - turn) for turn in range(count))
        return TokenChoice(token, bytes([token]), -0.5, top)


class Numbers(BaseModel):
    """What the fake model's /v1/predict takes."""

    model_config = ConfigDict(extra="forbid")

    numbers: list[int] = Field(min_length=1)


class Total(BaseModel):
    """What it answers."""

    total: float
    prompt_tokens: int


class FakeAnswerer(Answerer):
    """An engine as an open model; /v1/predict adds numbers up, in the engine's own thread when it is a BatchQueue."""

    def __init__(self, engine: Any, name: str, folder: Path, can: Sequence[str]) -> None:
        self.can = frozenset(can)  # type: ignore[misc]
        self.engine, self.name, self.folder = engine, name, folder
        self.backend, self.why, self.context = "fake", "tests need no model", getattr(engine, "context", None)

    @property
    def request_model(self) -> type[Numbers]:
        return Numbers

    @property
    def response_model(self) -> type[Total]:
        return Total

    def read(self, words: Sequence[str]) -> Numbers:
        return Numbers(numbers=[int(word) for word in words])

    def submit(self, request: Numbers, stop: threading.Event | None = None) -> Future[Any]:
        if 13 in request.numbers:
            raise DataError("13 cannot be added")
        return self.engine.submit(request.numbers, stop)

    def show(self, response: Total) -> list[str]:
        return [f"{response.total}"]


def served(
    engine: Any, name: str = "fake", folder: Path = Path("nowhere"), can: Sequence[str] = ("generate", "predict")
) -> ServedModel:
    """An engine, or an open model, as a model of a server."""
    answerer = engine if isinstance(engine, Answerer) else FakeAnswerer(engine, name, folder, can)
    return ServedModel(name, answerer, artifact_id="0" * 64, size_bytes=1234)


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    state: State
    server: process.Server

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)


@contextlib.contextmanager
def serving(
    *engines: Any,
    settings: Settings | None = None,
    keys: KeyRing | None = None,
    models: Sequence[ServedModel] = (),
    send_buffer: int | None = None,
) -> Iterator[Running]:
    """uvicorn on a free port, around `engines` (the first is called "fake") and `models`.

    `send_buffer`: bytes that the kernel holds for a connection.
    """
    named = [served(engine, "fake" if not place else f"fake-{place}") for place, engine in enumerate(engines)]
    state = make_state([*named, *models], settings, keys)
    sock = process.listen("127.0.0.1", 0)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = process.make_server(state)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not begin"
            time.sleep(0.005)
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", state, server)
    finally:
        server.should_exit = True
        thread.join(15)
        state.threads.shutdown()
        for model in state.models.values():
            model.answerer.close()
        assert not thread.is_alive(), "the server did not end"
