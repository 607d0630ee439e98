"""Where standard output goes, also for compiled code, which writes past Python."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


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
