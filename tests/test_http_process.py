"""`gulliver serve` as a process: from a folder to answers, and to its end by a signal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from http_samples import FakeEngine
from http_samples import served as fake_model
from language_samples import write_causal

from gulliver.cli import serve as commands_serve
from gulliver.cli.parser import parsed
from gulliver.cli.session import Session
from gulliver.core.errors import ConfigError
from gulliver.core.progress import Progress
from gulliver.serve import process
from gulliver.serve.keys import add_key
from gulliver.serve.process import listen
from gulliver.serve.state import State

FAKE = """
import sys
sys.path.insert(0, {tests!r})
from http_samples import FakeEngine, served
from gulliver.serve import logs, process
from gulliver.serve.app import make_state
from gulliver.serve.state import Settings
logs.configure()
engine = FakeEngine(answer=lambda request: "word " * 40, pause=0.01)
sock = process.listen("127.0.0.1", 0)
process.run(make_state([served(engine)], Settings(grace_seconds=float(sys.argv[1]))), sock)
engine.close()
"""
SERVE = "import sys; from gulliver.cli.main import main; sys.exit(main(sys.argv[1:]))"
BODY: dict[str, Any] = {"model": "fake", "prompt": "a", "max_tokens": 500, "stream": True}


@contextlib.contextmanager
def started(code: str, *words: object) -> Iterator[tuple[subprocess.Popen[str], str, list[dict[str, Any]]]]:
    """A process that runs `code`, its URL once it serves, and its log, which grows."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    rows: list[dict[str, Any]] = []
    try:
        for line in process.stderr:
            rows.append(json.loads(line))
            if rows[-1]["event"] == "serving":
                break
        else:
            raise AssertionError(f"it ended before it served: {rows}")
        reader = threading.Thread(target=lambda stream: rows.extend(map(json.loads, stream)), args=(process.stderr,))
        reader.start()
        yield process, f"http://127.0.0.1:{rows[-1]['port']}", rows
        reader.join(10)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def fake() -> str:
    return FAKE.format(tests=str(Path(__file__).parent))


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_stream_finish_and_ends_with_0(name: signal.Signals) -> None:
    with started(fake(), 120) as (process, url, rows), httpx.Client(base_url=url, timeout=120) as client:
        with client.stream("POST", "/v1/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(name)
            while client.get("/readyz").status_code != 503:
                time.sleep(0.01)
            assert client.post("/v1/completions", json=BODY).status_code == 503
            text = "\n".join(lines)
        assert text.count("data: {") > 150 and '"finish_reason":"stop"' in text and "[DONE]" in text
        assert process.wait(30) == 0
    assert [row["event"] for row in rows][-2:] == ["request", "stopped"] and "draining" in [
        row["event"] for row in rows
    ]


def test_a_stream_that_outlives_the_grace_time_is_told() -> None:
    with started(fake(), 0.2) as (process, url, rows), httpx.Client(base_url=url, timeout=120) as client:
        with client.stream("POST", "/v1/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert '"code":"shutting_down"' in text and "[DONE]" in text
        assert process.wait(30) == 0
    assert "grace_over" in [row["event"] for row in rows]


def test_a_second_signal_skips_the_grace_time() -> None:
    with started(fake(), 60) as (process, url, _), httpx.Client(base_url=url, timeout=120) as client:
        with client.stream("POST", "/v1/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while client.get("/readyz").status_code != 503:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert '"code":"shutting_down"' in "\n".join(lines)
        assert process.wait(30) == 0


def test_idle_connections_do_not_hold_the_process() -> None:
    with started(fake(), 120) as (process, url, _), httpx.Client(base_url=url, timeout=120) as client:
        assert client.get("/healthz").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_folder_is_served_from_the_command_line(tmp_path: Path) -> None:
    folder = write_causal(tmp_path / "tiny")
    keys = tmp_path / "keys.json"
    words = (
        "serve",
        f"small={folder}",
        "--port",
        0,
        "--threads",
        1,
        "--cache-tokens",
        512,
        "--api-keys",
        keys,
    )
    headers = {"authorization": f"Bearer {add_key(keys, 'ann')}"}
    with (
        started(SERVE, *words) as (process, url, rows),
        httpx.Client(base_url=url, timeout=60, headers=headers) as client,
    ):
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["small"]
        answer = client.post(
            "/v1/completions", json={"model": "small", "prompt": "home", "max_tokens": 4, "ignore_eos": True}
        )
        assert answer.json()["usage"]["completion_tokens"] == 4
        card = client.get("/api/models/small").json()
        assert card["size_bytes"] > 1000 and card["context"] == 128 and card["why"] and card["artifact_id"] is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert next(row for row in rows if row["event"] == "request" and row.get("model"))["key"] == "ann"


def test_a_native_model_is_served_without_torch() -> None:
    code = "import sys; import gulliver.cli.serve, gulliver.serve.process, gulliver.runtime.batching.engine\n"
    code += "import gulliver.tasks.encoder.answerer\n"
    code += "sys.exit(bool({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("m", "--slots", "0"), "--slots is 0"),
        (("m", "--timeout", "-1"), "--timeout is -1"),
        (("m", "--cache-tokens", "0"), "--cache-tokens is 0"),
        (("m", "--grace", "-1"), "--grace is -1"),
        (("m", "--max-body", "big"), "--max-body is 'big'"),
        (("m", "--api-keys", "/no/such/file"), "/no/such/file"),
        (("m", "--port", "99999"), "99999"),
        (("m", "--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("a/m", "b/m", "--port", "0"), "two models would be called 'm'"),
        (("=x", "--port", "0"), "names no model"),
        (("m", "--port", "0", "--host", "0.0.0.0"), "--host 0.0.0.0 lets other machines in"),
        (("m", "--port", "0", "--allowed-host", "http://x"), "--allowed-host is 'http://x'"),
    ],
)
def test_wrong_options_stop_early(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        line = parsed(["serve", *words])
        line.row.act(line.given, SimpleNamespace())


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=f"port {other.getsockname()[1]} cannot be used"):
            listen("127.0.0.1", other.getsockname()[1])
    with pytest.raises(ConfigError, match="--host is empty"):
        listen("", 0)


def test_of_two_servers_that_load_the_second_is_told_at_once() -> None:
    first = listen("127.0.0.1", 0)
    with first, pytest.raises(ConfigError, match="cannot be used"):
        listen("127.0.0.1", first.getsockname()[1])


def test_keys_are_needed_where_others_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(tmp_path / "keys.json", "ann")
    served: list[State] = []
    monkeypatch.setattr(commands_serve, "opened", lambda name, *rest: fake_model(FakeEngine(), name))
    monkeypatch.setattr(process, "run", lambda state, sock: served.append(state))
    for words in (
        ("--host", "0.0.0.0", "--without-keys", "--allowed-host", "models.example"),
        ("--host", "0.0.0.0", "--api-keys", str(tmp_path / "keys.json")),
        ("--host", "localhost"),
        ("--host", "127.0.0.2"),
    ):
        line = parsed(["serve", "m", "--port", "0", *words])
        assert line.row.act(line.given, SimpleNamespace())[1] == ["stopped"]
    assert served[0].settings.allowed_hosts == ("models.example",) and served[0].settings.host == "0.0.0.0"
    for words in (("--without-keys",), ("--allowed-host", "x")):
        with pytest.raises(ConfigError, match="keys"):
            line = parsed(["serve", "m", "--port", "0", "--api-keys", str(tmp_path / "keys.json"), *words])
            line.row.act(line.given, SimpleNamespace())


SLOW = """
import os, sys, time
from gulliver.cli import main, serve
serve.opened = lambda *given: (os.write(2, b"loading\\n"), time.sleep(60))
sys.exit(main.main(["serve", "m={folder}", "--port", "0"]))
"""


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_models_are_loaded_ends_it(name: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW.format(folder=write_causal(tmp_path / "m"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stderr.readline() == "loading\n"
        process.send_signal(name)
        assert process.communicate(timeout=30) == ("stopped before it served\n", "") and process.returncode == 0


def test_closed_standard_streams_change_nothing(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", f"m={write_causal(tmp_path / 'm')}", "--port", str(port), "--home", str(tmp_path / "home")]
    line = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "-", sys.executable, "-c", SERVE, *words]
    with subprocess.Popen(line) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        try:
            while process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    assert client.get("/healthz").status_code == 200
                    break
                time.sleep(0.05)
            answer = client.post("/v1/completions", json={"model": "m", "prompt": "home", "max_tokens": 2})
            assert answer.status_code == 200
            opened = {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)}
            assert opened == {"/dev/null"}
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_damaged_weights_are_not_served_with_verify(tmp_path: Path, command: Any) -> None:
    folder = write_causal(tmp_path / "plain")
    code, _, told = command("serve", folder, "--verify", "--port", "0")
    assert code == 2 and "gulliver pull" in told and told.count("\n") == 1
    code, document, _ = command("pull", folder, "--out", tmp_path / "model", "--json")
    assert code == 0
    weights = next((tmp_path / "model").glob("*.safetensors"))
    whole = weights.read_bytes()
    session = Session(str(tmp_path / "home"), None, Progress(quiet=True), "")
    commands_serve.verified(str(tmp_path / "model"), session)
    commands_serve.verified(json.loads(document)["id"], session)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, told = command("serve", tmp_path / "model", "--verify", "--port", "0")
    assert code == 2 and f"{weights.name} differs" in told and told.count("\n") == 1


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "fitted").mkdir()
    specs = [f"{tmp_path}/fitted/", "catalog:smollm2", "hf:org/name", "big=x/y.gguf", "z.gguf", "abc123"]
    names = [name for name, _ in commands_serve.named_models(specs)]
    assert names == ["fitted", "smollm2", "name", "big", "z", "abc123"]
