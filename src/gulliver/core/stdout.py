"""Where standard output goes, also for compiled code, which writes past Python; and streams that are closed or full.

The work never ends because its progress cannot be shown; the result that cannot be printed is an error of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from gulliver.core.errors import StorageError


@contextlib.contextmanager
def stdout_into(descriptor: int) -> Iterator[None]:
    """All that is written to file descriptor 1 goes to `descriptor` instead."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def ready_streams() -> None:
    """Standard streams that can be used whatever they were: closed ones lead to /dev/null, so that no file that is

    opened later takes their place; a character that the terminal's encoding lacks is written as an escape.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Unfailing(2, "w", closefd=False), sys.stderr)


def abandon_stdout() -> None:
    """What is still to be written to standard output goes nowhere: it cannot be written, or its reader has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _text(raw: io.RawIOBase, before: Any) -> io.TextIOWrapper:
    encoding = getattr(before, "encoding", None) or "utf-8"
    lines = raw.isatty() or isinstance(raw, _Unfailing)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


class _Output(io.FileIO):
    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as failure:
            told = f"standard output cannot be written: {failure.strerror}"
            raise StorageError(f"{told}; what was made is kept, and the same command finds it") from None


class _Unfailing(io.FileIO):
    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError:  # the stream is closed or its disk is full: the work continues
            return len(data)
