"""Threads for what must not hold up the event loop: rendering, tokenizing, compiling a grammar.

Each model has its own, so that a model whose template or tokenizer takes all the time it may holds up no other. They
can be abandoned: a thread that never ends keeps neither a request past its time limit nor the process from its end,
as those of concurrent.futures would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from gulliver.runtime.batching.records import QueueFull

RETRY_SECONDS = 1.0


class Threads:
    """`count` threads, started when they are needed, and at most `waiting` calls that no thread has taken yet."""

    def __init__(self, count: int = 4, waiting: int = 256) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        self._count = count
        self._waiting = waiting
        self._lock = threading.Lock()
        self._started = 0
        self._idle = 0
        self._untaken = 0  # calls that no thread has taken yet

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """The future of `work(*arguments)`; a cancel while it waits spares the work. QueueFull when too many wait."""
        future: Future[Any] = Future()
        with self._lock:
            if self._untaken >= self._waiting:
                raise QueueFull(self._untaken, RETRY_SECONDS)
            self._untaken += 1
            if self._idle < self._untaken and self._started < self._count:
                self._started += 1
                threading.Thread(target=self._run, name="gulliver-prepare", daemon=True).start()
            self._calls.put((future, work, arguments))
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            future, work, arguments = self._calls.get()
            with self._lock:
                self._idle -= 1
                self._untaken -= 1
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(*arguments))
            except BaseException as error:  # a library in another language may raise past Exception
                future.set_exception(error)
            del future, work, arguments  # what was asked is not kept until the next call
