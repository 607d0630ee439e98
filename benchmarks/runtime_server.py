"""A server as a process of its own: started, waited for, watched from outside, and ended as an operator would."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

READY_SECONDS = 120.0
END_SECONDS = 60.0


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """`with Server(command, health="/healthz") as server:` runs a server until the block ends.

    A `--port 0` in the command is replaced by a free port. `seconds_to_ready` runs from the start of the process to
    the first 200 of `health`; `drained_seconds` from SIGTERM to the end, None when it had to be killed.
    """

    def __init__(self, command: Sequence[object], health: str) -> None:
        self.port = free_port()
        self.command = [str(word) for word in command]
        place = self.command.index("--port") + 1
        if self.command[place] == "0":
            self.command[place] = str(self.port)
        self.port = int(self.command[place])
        self._health = health
        self.seconds_to_ready = 0.0
        self.drained_seconds: float | None = None
        self.exit_code: int | None = None

    def __enter__(self) -> Server:
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        began = time.monotonic()
        self.process = subprocess.Popen(self.command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            while time.monotonic() - began < READY_SECONDS:
                if self.process.poll() is not None:
                    raise SystemExit(f"{self.command[0]}: exit {self.process.returncode}\n{self.log()}")
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if self._answer("GET", self._health, None)[0] == 200:
                        self.seconds_to_ready = time.monotonic() - began
                        return self
                time.sleep(0.05)
            raise SystemExit(f"{self.command[0]}: not ready after {READY_SECONDS:.0f} s\n{self.log()}")
        except BaseException:
            self.process.kill()
            self.process.wait()
            self._log.close()
            raise

    def __exit__(self, *_: object) -> None:
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_SECONDS)
            self.drained_seconds = time.monotonic() - began
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.exit_code = self.process.returncode
        self._log.close()

    def log(self, characters: int = 3000) -> str:
        """The end of what the server has said."""
        self._log.seek(0)
        return self._log.read()[-characters:]

    def post(self, path: str, body: dict) -> dict:
        """The answer to one request. RuntimeError for any status but 200."""
        status, text = self._answer("POST", path, json.dumps(body))
        if status != 200:
            raise RuntimeError(f"{path}: {status} {text[:500]}")
        return json.loads(text)

    def get(self, path: str) -> str:
        """The body of a page. RuntimeError for any status but 200."""
        status, text = self._answer("GET", path, None)
        if status != 200:
            raise RuntimeError(f"{path}: {status} {text[:500]}")
        return text

    def _answer(self, method: str, path: str, body: str | None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=READY_SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def cpu_seconds(self) -> float:
        """CPU time that the process has used so far, without its children."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


class Resident:
    """Samples the resident memory of a process once a `period`: bytes in `sizes`, seconds from the start in `times`."""

    def __init__(self, pid: int, period: float = 1.0) -> None:
        self.times: list[float] = []
        self.sizes: list[int] = []
        self._pid, self._period, self._end = pid, period, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Resident:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._period):
            size = resident_bytes(self._pid)
            if size:
                self.times.append(time.monotonic() - self._began)
                self.sizes.append(size)


def resident_bytes(pid: int) -> int:
    """VmRSS of a process and all that descend from it, in bytes; those that have gone count nothing."""
    total, left = 0, [pid]
    while left:
        one = left.pop()
        with contextlib.suppress(OSError, ValueError):
            status = Path(f"/proc/{one}/status").read_text()
            total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024
            for task in Path(f"/proc/{one}/task").iterdir():
                left += [int(word) for word in (task / "children").read_text().split()]
    return total
