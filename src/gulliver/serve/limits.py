"""Limits per key, as token buckets: full at first, filled again at the stated rate, at most one minute's worth.

A request takes one from the bucket of requests before it is read. What its tokens will be is not known then, so it is
let in while the bucket of tokens is above zero and charged afterwards, prompt and completion; the bucket may fall below
zero, and nothing more is let in until the debt is paid by time. Over a long time the rate holds exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MINUTE = 60.0


class Bucket:
    """A bucket of `per_minute` units. `clock` gives seconds and never goes back."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._then = clock()

    def level(self) -> float:
        """What is in it now; negative is a debt."""
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._then) * self.per_minute / MINUTE)
        self._then = now
        return self._level

    def take(self, amount: float) -> None:
        """Take out, whatever the level is."""
        self._level = self.level() - amount

    def seconds_until(self, amount: float) -> float:
        """Seconds until it holds `amount`; 0 if it does."""
        return max(0.0, (amount - self.level()) * MINUTE / self.per_minute)


class Limiter:
    """The two limits of one key; None is unlimited."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._buckets = {name: Bucket(limit, clock) for name, limit in limits.items() if limit}

    def admit(self) -> tuple[str, float] | None:
        """None, and the request is counted; or the limit reached ("requests", "tokens") and seconds until a retry."""
        for name, bucket in self._buckets.items():
            if (wait := bucket.seconds_until(1.0)) > 0:
                return name, wait
        self._take("requests", 1)
        return None

    def charge(self, tokens: int) -> None:
        """Count the tokens of a request that was let in."""
        self._take("tokens", tokens)

    def _take(self, name: str, count: int) -> None:
        if name in self._buckets:
            self._buckets[name].take(count)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's x-ratelimit-* headers for what is limited."""
        found = []
        for name, bucket in self._buckets.items():
            left = max(0, int(bucket.level()))
            found.append((f"x-ratelimit-limit-{name}".encode(), str(bucket.per_minute).encode()))
            found.append((f"x-ratelimit-remaining-{name}".encode(), str(left).encode()))
        return found
