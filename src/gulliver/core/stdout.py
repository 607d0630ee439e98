"""Where standard output goes, also for compiled code, which writes past Python."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def open_standard_streams() -> None:
    """Give what was started with closed streams (`>&- 2>&-`) the null device in their place.

    Else the next files that are opened, a database or a socket, get the numbers 0 to 2, and what compiled code prints
    is written into them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # what Python does with a stream that was closed when it began
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the end)


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
