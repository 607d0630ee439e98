"""Why a request is not taken now, though nothing is wrong with it."""

from __future__ import annotations

from gulliver.core.errors import GulliverError


class QueueFull(GulliverError):
    """The engine's waiting queue is full. `retry_after_seconds`: when there will be room, by recent rates."""

    def __init__(self, waiting: int, retry_after_seconds: float) -> None:
        super().__init__(f"the queue is full ({waiting} requests waiting); retry in {retry_after_seconds:.0f} s")
        self.retry_after_seconds = retry_after_seconds


class GrammarsFull(QueueFull):
    """The grammars that running requests hold take all the memory that grammars may."""

    def __init__(self, held: int, retry_after_seconds: float) -> None:
        super().__init__(held, retry_after_seconds)
        told = f"{held} JSON schemas of running requests take all the memory for schemas"
        self.args = (f"{told}; retry in {retry_after_seconds:.0f} s",)


class EngineClosed(GulliverError):
    """The engine drains or is closed and takes no new requests."""


class EngineLost(EngineClosed):
    """The engine's thread is dead: what it was asked is not answered."""
