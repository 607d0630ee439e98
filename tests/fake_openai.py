"""A stand-in for the server, for tests of the chat page: the page's files, and answers that a test has written."""

from __future__ import annotations

import json
import select
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gulliver.serve.pages import PAGE_HEADERS

CONSOLE = Path(__file__).parent.parent / "src" / "gulliver" / "serve" / "console"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Reply:
    """One answer: `pieces` of text, each after `delay_seconds`; or an error when `status` is not 200.

    With `hold` the stream stays open after its last piece, without an end, until the client goes away or the test
    calls `FakeServer.release`. With `cut` the connection closes there. `fault` is an error sent within the stream.
    """

    pieces: Sequence[str] = ("Hello", " there", ".")
    delay_seconds: float = 0.0
    hold: bool = False
    cut: bool = False
    finish: str = "stop"
    fault: str = ""
    status: int = 200
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class FakeServer(ThreadingHTTPServer):
    """What it serves (`models`, `about`, `key`), the `replies` still to give, and the `requests` it has had."""

    daemon_threads = True
    request_queue_size = 128  # with the library's 5, a page that asks for all its files at once may wait seconds

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reset()

    def reset(self) -> None:
        """Forget everything that a test has set."""
        self.models = ["small-72MB", "large-145MB"]
        self.about: dict[str, dict[str, Any]] = {}
        self.key = ""
        self.replies: deque[Reply] = deque()
        self.requests: list[dict[str, Any]] = []
        self.released = threading.Event()
        self.cancelled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def release(self) -> None:
        """Let a held answer end."""
        self.released.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a connection is no error here."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.count("/") == 1:
            return self._file(CONSOLE / (path[1:] or "index.html"))
        if self._refused():
            return None
        if path == "/v1/models":
            models = [
                {"id": name, "object": "model", "created": 0, "owned_by": "gulliver"} for name in self.server.models
            ]
            return self._json({"object": "list", "data": models})
        about = self.server.about.get(unquote(path.removeprefix("/api/models/")))
        return self._json(about) if about else self._error(404, "there is no such model")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self._refused():
            return
        reply = self.server.replies.popleft() if self.server.replies else Reply()
        if reply.status != 200:
            return self._error(reply.status, reply.message, reply.headers)
        self._head(200, "text/event-stream")
        self._stream(reply)

    def _stream(self, reply: Reply) -> None:
        for number, piece in enumerate(reply.pieces):
            time.sleep(reply.delay_seconds)
            role = {"role": "assistant"} if number == 0 else {}
            self._send({"choices": [{"index": 0, "delta": {**role, "content": piece}, "finish_reason": None}]})
        if reply.hold and self._left():
            return
        if reply.fault:
            self._send({"error": {"message": reply.fault, "type": "server_error", "code": None}})
        if reply.cut or reply.fault:
            return
        self._send({"choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish}]})
        usage = {"prompt_tokens": 7, "completion_tokens": 2 * len(reply.pieces), "total_tokens": 0}
        self._send({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _left(self) -> bool:
        """Wait for the test or for the client's end; True when the client went away."""
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end and not self.server.released.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.02)
            if readable:
                self.server.cancelled.set()
                return True
        return False

    def _send(self, chunk: Mapping[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def _refused(self) -> bool:
        wrong = bool(self.server.key) and self.headers["Authorization"] != f"Bearer {self.server.key}"
        if wrong:
            self._error(401, "give a key")
        return wrong

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._error(404, "no such file")
        self._head(200, TYPES[path.suffix])
        self.wfile.write(path.read_bytes())

    def _json(self, body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, "application/json", headers)
        self.wfile.write(json.dumps(body).encode())

    def _error(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self._json({"error": error}, status, headers)

    def _head(self, status: int, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **PAGE_HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A server on a free port of this machine while the block runs."""
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def example_about(name: str) -> dict[str, Any]:
    """What /api/models/{name} says about a model, with evidence and a card as Gulliver writes them."""
    artifact = "a493ea04d72a63827495791dd8ca096ae56a6d541769d9db6339ccf331963b90"

    def row(metric: str, value: float, low: float, high: float, unit: str, direction: str, n: int) -> dict[str, Any]:
        data = "" if n == 1 else "fb3eb1edc703b675b27d2308e905ad5f89ef2bc92b4c3056c4528449c36d0197"
        return {
            "metric": metric, "value": value, "low": low, "high": high, "unit": unit, "direction": direction, "n": n,
            "seed": 0, "data_hash": data, "artifact_id": artifact, "parent_id": None, "detail": {},
            "machine": "a processor, 2 cores, 25 GB", "command": "gulliver audit MODEL --data text.txt",
        }  # fmt: skip

    evidence = [
        row("perplexity", 21.8596, 19.0683, 25.0595, "ppl", "lower", 24),
        row("baseline_perplexity", 677.5128, 614.2222, 747.3249, "ppl", "none", 24),
        row("perplexity_ratio", 1.05226, 1.0456, 1.0589, "ratio", "lower", 24),
        row("kl_divergence", 0.0631, 0.0596, 0.0665, "nat", "lower", 24),
        row("top1_agreement", 0.8686, 0.8603, 0.8769, "fraction", "higher", 24),
        row("quality_loss", 0.0523, 0.0456, 0.0589, "fraction", "lower", 24),
        row("size_bytes", 71_950_336, 71_950_336, 71_950_336, "bytes", "lower", 1),
        row("bits_per_weight", 4.279, 4.279, 4.279, "bits", "lower", 1),
        row("decode_tokens_per_s", 241.3, 238.1, 244.8, "tokens/s", "higher", 9),
    ]
    card = (
        "---\nlibrary_name: gulliver\ntags:\n- gulliver\n---\n\n# A small model, 71.95 MB\n\n"
        "**PASS** Asked for at most 72 MB. Reached 71.95 MB.\n\n## Formats\n\n"
        "| format | parts | bytes |\n| --- | --- | --- |\n| `c4g32` | 99 | 48.12 MB |\n| `c3g32` | 31 | 6.842 MB |\n\n"
        "## Use\n\n```sh\ngulliver verify a493ea04d72a          # every hash again\n```\n\n"
        "1. pull made model `2c78ac957552` from outside\n1. quantize made model `a493ea04d72a`\n\n"
        "Text with \\*escapes\\* and &lt;b&gt;entities&lt;/b&gt;.\n"
    )
    why = "AVX512-VNNI kernels; llama architecture, all tensors packed"
    return {
        "id": name, "size_bytes": 71_950_336, "backend": "native", "why": why, "context": 2048,
        "card": card, "evidence": evidence,
    }  # fmt: skip
