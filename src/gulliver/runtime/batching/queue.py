"""Dynamic batching for models that answer in one pass: a bounded queue, one thread, small batches.

Whatever waits when the thread is free is answered together, as far as it fits: nothing waits for company. Requests take
turns, so that one of a thousand items does not hold up one of a single item.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from gulliver.core.errors import GulliverError
from gulliver.runtime.batching.counters import ROWS, SECONDS, Histogram, seconds_for
from gulliver.runtime.batching.records import EngineClosed, QueueFull

Item = TypeVar("Item")
Answer = TypeVar("Answer")
log = logging.getLogger("gulliver.serve")
TOTALS = ("requests", "rejected", "steps", "rows", "finished_stop", "finished_cancelled", "finished_error")


@dataclass(eq=False)
class _Job:
    """One request under way: its items, cheapest first, and what they were answered."""

    items: list[Any]
    costs: list[int]
    places: list[int]  # of each item in the request
    one: bool  # the future's result is the only answer, not a list
    stop: threading.Event | None
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    begun: bool = False
    taken: int = 0  # items that are in a batch, or answered
    answers: dict[int, Any] = field(default_factory=dict)

    @property
    def stopped(self) -> bool:
        return self.future.cancelled() or (self.stop is not None and self.stop.is_set())


@dataclass
class _Share:
    """The items of one job that are in a batch: those from `first` up to `end`."""

    job: _Job
    first: int
    end: int

    @property
    def items(self) -> list[Any]:
        return self.job.items[self.first : self.end]


def _next_batch(jobs: deque[_Job], most: int) -> tuple[list[_Share], deque[_Job]]:
    """(batch, jobs that have items left): of the first job as much as fits, of the others what is of like cost.

    Jobs that got nothing come first the next time.
    """
    shares: list[_Share] = []
    waiting: list[_Job] = []
    begun: list[_Job] = []
    count, largest = 0, 0
    for job in jobs:
        first = end = job.taken
        while end < len(job.items):
            cost = job.costs[end]
            if shares and not largest <= 2 * cost <= 2 * largest:
                break  # most of what it or the others cost would be padding
            if count and (count + 1) * max(cost, largest) > most:
                break
            count, largest, end = count + 1, max(cost, largest), end + 1
        if end > first:
            job.taken = end
            shares.append(_Share(job, first, end))
        if end < len(job.items):
            (begun if end > first else waiting).append(job)
    return shares, deque([*waiting, *begun])


class BatchQueue(Generic[Item, Answer]):
    """Answers items through `run`, a function from items to as many answers, called in one thread.

    `queue`: most requests that wait; `batch`: most of a batch's cost, which is its count times its largest `cost` (so
    padding counts); a single item may cost more. `unit`: the name under which `stats` counts the costs. An exception of
    `run` ends the request that caused it: a batch of several requests is repeated request by request.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Item]], Sequence[Answer]],
        *,
        queue: int = 256,
        batch: int = 16,
        cost: Callable[[Item], int] = lambda item: 1,
        unit: str | None = None,
    ) -> None:
        self.name = name
        self._answer = run
        self._queue = queue
        self._batch = batch
        self._cost = cost
        self._unit = unit
        self._jobs: deque[_Job] = deque()  # with items that are not in a batch yet
        self._running: list[_Job] = []  # in the batch that runs
        self._changed = threading.Condition()  # guards all that is above and below
        self._draining = False
        self._closing = False
        self._numbers: dict[str, float] = dict.fromkeys(TOTALS + ((unit,) if unit is not None else ()), 0.0)
        self._histograms = {"request_seconds": Histogram(SECONDS), "queue_seconds": Histogram(SECONDS)}
        self._histograms["rows_per_step"] = Histogram(ROWS)
        self._ends: deque[float] = deque(maxlen=64)
        self._thread = threading.Thread(target=self._run, name=f"batches {name}", daemon=True)
        self._thread.start()
        _open.add(self)

    # ---- for other threads ----
    def submit(self, item: Item, stop: threading.Event | None = None) -> Future[Answer]:
        """The future answer to one item. QueueFull when too many requests wait, EngineClosed when closed or draining.

        When `stop` is set or the future is cancelled, what is not in a batch yet never runs, and the future ends by
        EngineClosed.
        """
        return self._submit([item], stop, one=True)

    def submit_all(self, items: Sequence[Item], stop: threading.Event | None = None) -> Future[list[Answer]]:
        """The future answers to all items of one request, in their order; see `submit`."""
        return self._submit(items, stop, one=False)

    def stats(self) -> dict[str, float]:
        """Numbers as of now, by name.

        Gauges: requests_running, requests_waiting. Totals since the start: requests, rejected, finished_stop,
        finished_cancelled, finished_error, steps (batches), rows (items), and the costs under the queue's `unit`.
        """
        with self._changed:
            waiting = sum(not job.begun for job in self._jobs)
            open_jobs = len({id(job) for job in (*self._jobs, *self._running)})
            gauges = {"requests_running": float(open_jobs - waiting), "requests_waiting": float(waiting)}
            return gauges | self._numbers

    def histograms(self) -> dict[str, Histogram]:
        """request_seconds and queue_seconds (from submit), rows_per_step (items in a batch)."""
        return dict(self._histograms)

    def drain(self, seconds: float) -> bool:
        """Take no new requests and let the others end; those that have not after `seconds` are ended by EngineClosed.

        True when none had to be. `close` is still to be called.
        """
        with self._changed:
            self._draining = True
            ended = self._changed.wait_for(lambda: not self._jobs and not self._running, seconds)
            self._closing = True
            self._changed.notify_all()
        return ended

    def close(self) -> None:
        """End what waits, and the thread after the batch that runs."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _submit(self, items: Sequence[Item], stop: threading.Event | None, *, one: bool) -> Future[Any]:
        costs = [self._cost(item) for item in items]
        places = sorted(range(len(items)), key=costs.__getitem__)
        job = _Job([items[place] for place in places], [costs[place] for place in places], places, one, stop)
        with self._changed:
            if self._draining:
                raise EngineClosed(f"{self.name} is shutting down and takes no new requests")
            waiting = sum(not other.begun for other in self._jobs)
            if waiting >= self._queue:
                self._numbers["rejected"] += 1
                raise QueueFull(waiting, seconds_for(waiting, self._ends, time.monotonic()))
            self._numbers["requests"] += 1
            if self._unit is not None:
                self._numbers[self._unit] += sum(costs)
            if items:
                self._jobs.append(job)
                self._changed.notify_all()
        if not items:
            job.future.set_result([])
        return job.future

    # ---- the queue's thread ----
    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = []
                self._changed.notify_all()  # for drain
                self._changed.wait_for(lambda: self._jobs or self._closing)
                stopped = [job for job in self._jobs if self._closing or job.stopped]
                for job in stopped:
                    self._jobs.remove(job)
                shares = self._take()
                self._running = [share.job for share in shares]
            for job in stopped:
                self._end(job, self._stopped())
            if shares:
                self._batch_of(shares)
            elif self._closing:
                return

    def _take(self) -> list[_Share]:
        """The next batch, taken out of the jobs that wait."""
        shares, self._jobs = _next_batch(self._jobs, self._batch)
        now = time.monotonic()
        for share in shares:
            if not share.job.begun:
                share.job.begun = True
                self._histograms["queue_seconds"].add(now - share.job.arrived)
        if shares:
            count = sum(share.end - share.first for share in shares)
            self._numbers["steps"] += 1
            self._numbers["rows"] += count
            self._histograms["rows_per_step"].add(count)
        return shares

    def _batch_of(self, shares: list[_Share]) -> None:
        """Answer a batch; when that fails, each of its requests alone."""
        try:
            answers = list(self._answer([item for share in shares for item in share.items]))
            if len(answers) != sum(share.end - share.first for share in shares):
                raise RuntimeError(f"{self.name} gave {len(answers)} answers to another number of items")
        except BaseException as error:  # a library in another language may raise past Exception: the thread must live
            if len(shares) == 1:
                self._fail(shares[0].job, error)
                return
            for share in shares:
                if share.job.stopped:
                    self._end(share.job, self._stopped())
                else:
                    self._batch_of([share])
            return
        place = 0
        for share in shares:
            job, size = share.job, share.end - share.first
            job.answers |= zip(job.places[share.first : share.end], answers[place : place + size], strict=True)
            place += size
            if len(job.answers) == len(job.items):
                self._end(job, None)

    def _stopped(self) -> EngineClosed:
        return EngineClosed(f"the request to {self.name} was stopped")

    def _fail(self, job: _Job, error: BaseException) -> None:
        if not isinstance(error, GulliverError):
            log.error("a request failed", exc_info=error)
        if not isinstance(error, Exception):
            error = RuntimeError(f"{type(error).__name__}: {error}")
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
        self._end(job, error)

    def _end(self, job: _Job, error: BaseException | None) -> None:
        """Give the future its answer, unless it was cancelled."""
        now = time.monotonic()
        reason = "stop" if error is None else "cancelled" if isinstance(error, EngineClosed) else "error"
        self._numbers[f"finished_{reason}"] += 1
        self._histograms["request_seconds"].add(now - job.arrived)
        self._ends.append(now)
        if not job.future.set_running_or_notify_cancel():
            return
        if error is not None:
            job.future.set_exception(error)
            return
        answers = [job.answers[place] for place in range(len(job.items))]
        job.future.set_result(answers[0] if job.one else answers)


_open: weakref.WeakSet[BatchQueue[Any, Any]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A daemon thread that comes out of native code after Python's end would abort the process."""
    for queue in list(_open):
        queue.close()
