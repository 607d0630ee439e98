"""What an engine counts: histograms in Prometheus' form and a record of totals."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


class Histogram:
    """Counts of values by bucket: `counts[i]` values were at most `bounds[i]` and above the bound before it.

    `counts` has one entry more than `bounds`, for what lies above the last; `total` is the sum of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def seconds_for(waiting: int, ends: Sequence[float], now: float) -> float:
    """Seconds in which `waiting` requests will have begun, at the rate of the latest `ends` (in seconds): 1 to 120."""
    if len(ends) < 2:
        return 1.0
    rate = len(ends) / max(now - ends[0], 1e-3)
    return min(max(waiting / rate, 1.0), 120.0)


@dataclass
class Counters:
    """Totals since the engine began. Written by its thread alone, read by any."""

    requests: int = 0  # admitted to the queue
    rejected: int = 0  # QueueFull
    finished: dict[str, int] = field(default_factory=dict)  # by reason; every error counts as "error"
    preemptions: int = 0
    restarts: int = 0  # of the engine's thread, after what no request or step could be blamed for
    steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0  # of requests that began, found in the cache or not
    cached_tokens: int = 0
    completion_tokens: int = 0
    draft_offered: int = 0
    draft_accepted: int = 0
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    between_tokens_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    request_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    rows_per_step: Histogram = field(default_factory=lambda: Histogram(ROWS))
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=64))  # when the latest requests ended, seconds

    def drawn(self, tokens: int) -> None:
        """Count tokens that one request got in one step: a draft that came true comes all at once."""
        self.completion_tokens += tokens
        for _ in range(tokens - 1):
            self.between_tokens_seconds.add(0.0)

    def finish(self, reason: str, now: float, began: float) -> None:
        """Count the end of a request that was submitted at `began`."""
        reason = "error" if reason.startswith("error") else reason
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self.request_seconds.add(now - began)
        self.ends.append(now)

    def numbers(self) -> dict[str, float]:
        """The totals by name, `finished` as finished_REASON."""
        totals = {name: float(value) for name, value in vars(self).items() if isinstance(value, int)}
        reasons = {"stop": 0, "length": 0, "cancelled": 0, "timeout": 0, "error": 0} | self.finished
        return totals | {f"finished_{reason}": float(count) for reason, count in reasons.items()}

    def histograms(self) -> dict[str, Histogram]:
        """The histograms by name; seconds but for rows_per_step."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Histogram)}
