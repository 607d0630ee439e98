"""Why a request is not taken now, though nothing is wrong with it."""

from __future__ import annotations

from gulliver.core.errors import GulliverError


class QueueFull(GulliverError):
    """The engine's waiting queue is full. `retry_after_seconds`: when there will be room, by recent rates."""

    def __init__(self, waiting: int, retry_after_seconds: float) -> None:
        super().__init__(f"the queue is full ({waiting} requests waiting); retry in {retry_after_seconds:.0f} s")
        self.retry_after_seconds = retry_after_seconds


class EngineClosed(GulliverError):
    """The engine drains or is closed and takes no new requests."""
