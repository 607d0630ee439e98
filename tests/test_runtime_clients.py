"""The clients that load a server, and the server as a process: what they see is what happened."""

from __future__ import annotations

import http.server
import json
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of benchmarks/ can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


# ---- the clients ----------------------------------------------------------------------------------------------------
class Completions(http.server.BaseHTTPRequestHandler):
    """A streaming server whose behaviour the prompt's seed, the class attribute `mood`, decides."""

    protocol_version, mood = "HTTP/1.1", "well"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] and asked["ignore_eos"] and asked["temperature"] == 0
        if self.mood == "busy":
            self.send_response(429)
            self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200 if self.mood != "broken" else 500)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        count = asked["max_tokens"]
        self._event({"choices": [{"text": ""}]})  # half of a character
        for _ in range(count):
            self._event({"choices": [{"text": "a"}]})
        self._event({"choices": [], "usage": {"completion_tokens": count}})
        if self.mood != "cut":
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, event: dict[str, Any]) -> None:
        text = f"data: {json.dumps(event)}\n\n".encode()
        self._chunk(text[:5])  # an event may come in two chunks
        self._chunk(text[5:])

    def _chunk(self, text: bytes) -> None:
        self.wfile.write(f"{len(text):x}\r\n".encode() + text + b"\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Quiet(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that vanish are what is tested


@pytest.fixture
def port() -> Iterator[int]:
    with Quiet(("127.0.0.1", 0), Completions) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def client(port: int, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "runtime_client.py", "--port", port, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_a_burst_counts_the_tokens_that_the_server_counted(port: int) -> None:
    done = client(port, "burst", "--streams", 4, "--tokens", 7)
    found = json.loads(done.stdout)
    assert found["tokens"] == 28 and found["tokens_s"] == pytest.approx(28 / found["seconds"])
    assert 0 < found["first_token_seconds"]["median"] <= found["seconds"] and 0 <= found["cpu_share"] <= 1.5


@pytest.mark.parametrize("mood, told", [("broken", "status 500"), ("cut", r"without \[DONE\]"), ("busy", "busy")])
def test_a_burst_with_a_failed_stream_is_no_measurement(
    port: int, monkeypatch: pytest.MonkeyPatch, mood: str, told: str
) -> None:
    monkeypatch.setattr(Completions, "mood", mood)
    done = client(port, "burst", "--streams", 2, "--tokens", 3)
    assert done.returncode and re.search(told, done.stderr), done.stderr


def test_a_load_tells_killed_from_failed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("load", "--clients", 6, "--seconds", 1.2, "--killed")
    found = json.loads(client(port, *words, 0.5).stdout)
    assert found["errors"] == 0 and found["outcomes"]["killed"] > 0 and found["outcomes"]["done"] > 0
    assert found["tokens"] > 0 and found["p99_over_median"] >= 1
    monkeypatch.setattr(Completions, "mood", "cut")
    found = json.loads(client(port, *words, 0).stdout)
    assert found["errors"] == found["outcomes"]["the stream ended without [DONE]"] > 0
    monkeypatch.setattr(Completions, "mood", "busy")
    assert "no request was admitted: {'busy'" in client(port, *words, 0).stderr


def test_a_response_without_chunks_is_read_as_it_is() -> None:
    from runtime_client import unchunked

    assert unchunked(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n") == b"hello world"
    assert unchunked(b'data: {"a": 1}\n\ndata: [DONE]\n\n') == b'data: {"a": 1}\n\ndata: [DONE]\n\n'
    assert unchunked(b"5\r\nhello\r\n6\r\n wo") == b"hello wo"


# ---- servers --------------------------------------------------------------------------------------------------------
SERVER = """
import http.server, signal, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"fine")
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
server.serve_forever()
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_server_is_started_watched_and_ended() -> None:
    from runtime_server import Resident, Server

    with Server([sys.executable, "-c", SERVER, "--port", 0], health="/") as server:
        assert server.get("/") == "fine" and server.seconds_to_ready > 0
        with Resident(server.process.pid, period=0.02) as resident:
            time.sleep(0.2)
    assert len(resident.sizes) == len(resident.times) >= 3 and min(resident.sizes) > 1_000_000
    assert server.exit_code == 0 and server.drained_seconds is not None


def test_a_server_that_ends_at_once_says_why() -> None:
    from runtime_server import Server

    with pytest.raises(SystemExit, match=r"exit 3\nno such model"):
        Server([sys.executable, "-c", "print('no such model'); exit(3)", "--port", 0], health="/").__enter__()


def test_metrics_are_summed_over_models() -> None:
    from runtime_http import leftovers, totals

    text = (
        'gulliver_requests_running{model="a"} 1.0\ngulliver_requests_running{model="b"} 2.0\n'
        "gulliver_http_requests_active 0.0\n# HELP gulliver_requests_waiting x\n"
        'gulliver_draft_accepted_total{model="a"} 7.0\n'
    )
    assert leftovers(text) == {"gulliver_requests_running": 3.0, "gulliver_http_requests_active": 0.0}
    assert totals(text) == {"draft_accepted": 7.0, "completion_tokens": 0.0}
