"""Chat templates: messages to the text a model was trained on, exactly as transformers' `apply_chat_template` does it.

Templates come with models and are untrusted code: they run in a process of their own (sandbox.py), which sees plain
values alone, is limited in memory and time, and is replaced when it dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

from gulliver.core.errors import ArtifactError, ConfigError, first_line
from gulliver.runtime.text import sandbox

Objects = Sequence[Mapping[str, Any]]
LIMIT_SOURCE = 2_000_000  # characters of all templates of a model; the longest known have 30,000
SLOW_SECONDS = 2.0  # an answer that takes longer no longer competes with those that are being written
SLOW_PRIORITY = 5
WAIT_SECONDS = 600.0  # for an answer, whose processor time is limited: longer on a machine that is overloaded
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message's reasoning comes; templates read the first, some the second."""


class ChatTemplate:
    """A model's templates: `sources` by name ("default", "tool_use", …), `tokens` like bos_token -> "<s>"."""

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self._tokens = dict(tokens)
        self._process = _Process(self.sources)
        if (size := sum(map(len, self.sources.values()))) > LIMIT_SOURCE:
            raise ArtifactError(
                f"the model's chat templates have {size:,} characters; at most {LIMIT_SOURCE:,} are read"
            )
        for name, source in self.sources.items():
            try:
                sandbox.environment().parse(source)  # which runs nothing
            except Exception as error:  # Jinja's own errors, and those of Python on numbers and nesting
                reason = first_line(error)
                raise ArtifactError(f"the model's chat template {name!r} cannot be read: {reason}") from error

    def start(self) -> None:
        """Start the process in which the templates run, so that the first text need not wait for it."""
        if self.sources:
            self._process.start()

    def render(
        self, messages: Objects, tools: Objects | None = None, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a chat, as transformers' `apply_chat_template` renders it.

        `messages`: role, content, tool_calls, …; `tools`: JSON schemas of functions. ConfigError when the template
        refuses them, takes too much time or memory, or when there is none. Any thread may ask.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ConfigError("this model has no chat template; ask it for plain completions instead")
        if not messages:
            raise ConfigError("there are no messages; give at least one")
        values = self._tokens | variables | {"add_generation_prompt": add_generation_prompt, "documents": None}
        try:
            values |= {"messages": [_message(message) for message in messages], "tools": _plain(tools)}
            job = json.dumps((name, values)).encode()
        except (ValueError, RecursionError) as error:
            raise _refused(first_line(error)) from error
        kind, text = self._process.ask(job)
        if kind == sandbox.TEXT:
            return text
        if kind == sandbox.UNREADABLE:
            raise ArtifactError(f"the model's chat template cannot be read: {text}")
        raise _refused(text)


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"the model's chat template refuses these messages: {reason}")


class _Process:
    """The process of one model's templates. It answers one question at a time, and is started when it is not there."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources = sources
        self._lock = Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def start(self) -> None:
        """Start it, unless it runs; returns at once."""
        with self._lock:
            self._started()

    def ask(self, job: bytes) -> tuple[bytes, str]:
        """(kind of the answer, text): see sandbox.ANSWERS. A process that dies of the job has refused it."""
        with self._lock:
            process, begun = self._started(), time.monotonic()
            try:
                _send(process, job)
                answer = _answer(process)
                if time.monotonic() - begun > SLOW_SECONDS:  # its priority was lowered, which cannot be taken back
                    self._running = None
                    self._end()
                return answer
            except (OSError, EOFError):
                self._running = None
                self._end()
                limits = f"{sandbox.LIMIT_SECONDS:.0f} s or {sandbox.LIMIT_BYTES >> 20} MiB"
                return sandbox.REFUSED, f"it was stopped after {limits}"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is not None and self._running.poll() is None:
            return self._running
        self._end()
        command = [sys.executable, "-I", "-S", sandbox.__file__]
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise ConfigError(f"the process for the chat template cannot be started: {error.strerror}") from error
        self._end = weakref.finalize(self, _end, process)
        with contextlib.suppress(OSError):  # it died at once: the question after it says so
            _send(process, json.dumps((sys.path, self._sources, sandbox.LIMIT_SECONDS)).encode())
        self._running = process
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(OSError):  # what could not be written to it
        process.communicate()


def _send(process: subprocess.Popen[bytes], body: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(sandbox.HEAD.pack(b"j", len(body)) + body)
    process.stdin.flush()


def _answer(process: subprocess.Popen[bytes]) -> tuple[bytes, str]:
    """The next answer. EOFError when the process ends, or says nothing for too long."""
    assert process.stdout is not None
    ready = select.poll()  # select.select knows 1024 descriptors, of which a server may have more
    ready.register(process.stdout, select.POLLIN)
    if not ready.poll(SLOW_SECONDS * 1000):
        with contextlib.suppress(OSError):  # it ended meanwhile
            os.setpriority(os.PRIO_PROCESS, process.pid, SLOW_PRIORITY)
        if not ready.poll(WAIT_SECONDS * 1000):
            raise EOFError
    head = process.stdout.read(sandbox.HEAD.size)
    if len(head) < sandbox.HEAD.size:
        raise EOFError
    kind, size = sandbox.HEAD.unpack(head)
    if kind not in sandbox.ANSWERS or size > 4 * sandbox.LIMIT_CHARACTERS:
        raise EOFError
    text = process.stdout.read(size)
    if len(text) < size:
        raise EOFError
    return kind, text.decode("utf-8", "surrogatepass")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for templates: keys without a value are left out, reasoning has the names that are read."""
    plain = {key: value for key, value in _plain(message).items() if value is not None}
    reasoning = next((plain[name] for name in REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value made of JSON's types alone; anything else becomes its type's name."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
