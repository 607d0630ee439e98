"""Dynamic batching for models that answer in one pass: a bounded queue, one thread, small batches.

All requests that wait when the thread is free are answered together, as far as they fit; none waits for more to come.
Requests take turns, so that one of a thousand items does not hold up one of a single item.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
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
    taken: int = 0  # items that are in a batch, or answered
    answers: dict[int, Any] = field(default_factory=dict)

    @property
    def stopped(self) -> bool:
        return self.future.cancelled() or (self.stop is not None and self.stop.is_set())


_Batch = list[tuple[_Job, range]]  # jobs, and which of each one's items are in the batch


def _next_batch(jobs: deque[_Job], most: int) -> tuple[_Batch, deque[_Job]]:
    """(batch, jobs that have items left): of the first job as much as fits, of the others what is of like cost.

    Jobs without a place in this batch come first in the next.
    """
    batch: _Batch = []
    waiting: list[_Job] = []
    begun: list[_Job] = []
    count, largest = 0, 0
    for job in jobs:
        first = job.taken
        for cost in job.costs[first:]:
            if batch and not largest <= 2 * cost <= 2 * largest:
                break  # most of what it or the others cost would be padding
            if count and (count + 1) * max(cost, largest) > most:
                break
            count, largest, job.taken = count + 1, max(cost, largest), job.taken + 1
        if job.taken > first:
            batch.append((job, range(first, job.taken)))
        if job.taken < len(job.items):
            (begun if job.taken > first else waiting).append(job)
    return batch, deque([*waiting, *begun])


def _lose(name: str, jobs: Sequence[_Job], error: BaseException) -> None:
    """End jobs of a queue that does not know any more what became of them."""
    log.error("%s failed and begins anew", name, exc_info=error)
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(RuntimeError(f"the queue failed ({type(error).__name__})"))


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
        self._model = run
        self._queue = queue
        self._batch = batch
        self._cost = cost
        self._unit = unit
        self._jobs: deque[_Job] = deque()  # with items that are not in a batch yet
        self._running: list[_Job] = []  # with items in the batch that is computed
        self._changed = threading.Condition()  # guards all that is above and below
        self._draining = False
        self._closing = False
        self._numbers: dict[str, float] = dict.fromkeys(TOTALS + ((unit,) if unit is not None else ()), 0.0)
        bounds = {"request_seconds": SECONDS, "queue_seconds": SECONDS, "rows_per_step": ROWS}
        self._histograms = {histogram: Histogram(edges) for histogram, edges in bounds.items()}
        self._ends: deque[float] = deque(maxlen=64)
        self._thread = threading.Thread(target=self._run, name=f"batches {name}", daemon=True)
        self._thread.start()
        # A daemon thread that comes out of native code after Python's end would abort the process.
        atexit.register(self.close)

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
            waiting = self._waiting()
            open_jobs = len({id(job) for job in (*self._jobs, *self._running)})
            return {"requests_running": open_jobs - waiting, "requests_waiting": waiting} | self._numbers

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
        atexit.unregister(self.close)

    def _waiting(self) -> int:
        return sum(not job.taken for job in self._jobs)

    def _submit(self, items: Sequence[Item], stop: threading.Event | None, *, one: bool) -> Future[Any]:
        costs = [self._cost(item) for item in items]
        places = sorted(range(len(items)), key=costs.__getitem__)
        job = _Job([items[place] for place in places], [costs[place] for place in places], places, one, stop)
        with self._changed:
            if self._draining:
                raise EngineClosed(f"{self.name} is shutting down and takes no new requests")
            if (waiting := self._waiting()) >= self._queue:
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

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive()

    # ---- the queue's thread ----
    def _run(self) -> None:
        while True:
            try:
                self._batches()
                return
            except BaseException as error:  # a fault of ours, or of who waits for an answer
                with self._changed:
                    lost = [*self._jobs, *self._running]
                    self._jobs.clear()
                _lose(self.name, lost, error)

    def _batches(self) -> None:
        """Batch after batch until the queue is closed."""
        while True:
            with self._changed:
                self._running = []
                self._changed.notify_all()  # for drain
                self._changed.wait_for(lambda: self._jobs or self._closing)
                stopped = [job for job in self._jobs if self._closing or job.stopped]
                for job in stopped:
                    self._jobs.remove(job)
                batch, self._jobs = _next_batch(self._jobs, self._batch)
                self._running = [job for job, _ in batch]
                if batch:
                    self._count(batch)
            for job in stopped:
                self._end(job, self._stopped())
            if batch:
                self._answer(batch)
            elif self._closing:
                return

    def _count(self, batch: _Batch) -> None:
        now, rows = time.monotonic(), sum(len(part) for _, part in batch)
        for job, part in batch:
            if part.start == 0:
                self._histograms["queue_seconds"].add(now - job.arrived)
        self._numbers["steps"] += 1
        self._numbers["rows"] += rows
        self._histograms["rows_per_step"].add(rows)

    def _answer(self, batch: _Batch) -> None:
        """Answer a batch; when that fails, each of its requests alone."""
        places = [(job, index) for job, part in batch for index in part]
        try:
            answers = list(self._model([job.items[index] for job, index in places]))
            if len(answers) != len(places):
                raise RuntimeError(f"{self.name} gave {len(answers)} answers to {len(places)} items")
        except BaseException as error:  # a library in another language may raise past Exception: the thread must live
            for job, part in batch:
                if len(batch) > 1 and not job.stopped:
                    self._answer([(job, part)])
                else:
                    self._end(job, error if len(batch) == 1 else self._stopped())
            return
        for (job, index), answer in zip(places, answers, strict=True):
            job.answers[job.places[index]] = answer
        for job, _ in batch:
            if len(job.answers) == len(job.items):
                self._end(job)

    def _stopped(self) -> EngineClosed:
        return EngineClosed(f"the request to {self.name} was stopped")

    def _end(self, job: _Job, error: BaseException | None = None) -> None:
        """Give the future its answer, unless it was cancelled."""
        now = time.monotonic()
        reason = "stop" if error is None else "cancelled" if isinstance(error, EngineClosed) else "error"
        if reason == "error" and not isinstance(error, GulliverError):
            log.error("a request failed", exc_info=error)
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            self._numbers[f"finished_{reason}"] += 1
        self._histograms["request_seconds"].add(now - job.arrived)
        self._ends.append(now)
        if not job.future.set_running_or_notify_cancel():
            return
        if error is not None:
            wrapped = RuntimeError(f"{type(error).__name__}: {error}")
            job.future.set_exception(error if isinstance(error, Exception) else wrapped)
            return
        answers = [job.answers[place] for place in range(len(job.items))]
        job.future.set_result(answers[0] if job.one else answers)
