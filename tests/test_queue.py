"""A model that answers in one pass, under many callers: batches, bounds, stops and failures."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait

import pytest

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.queue import BatchQueue
from gulliver.runtime.batching.records import EngineClosed, QueueFull


class Held:
    """A model that doubles numbers. It waits at every batch until it is let go, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.entered.release()
        self.go.acquire()
        if 13 in items:
            raise ConfigError("13 has no double")
        if 666 in items:
            raise BaseException("a library in another language gave up")
        return [2 * item for item in items]

    def let_all_go(self) -> None:
        self.go.release(1000)


@pytest.fixture
def held() -> Iterator[Held]:
    model = Held()
    yield model
    model.let_all_go()


def test_what_waits_is_answered_together_and_a_full_queue_says_when_to_retry(held: Held) -> None:
    with_one = BatchQueue("doubles", held, queue=3, batch=2)
    first = with_one.submit(1)
    held.entered.acquire()  # the thread is busy with it
    others = [with_one.submit(item) for item in (2, 3, 4)]
    with pytest.raises(QueueFull, match="3 requests waiting") as full:
        with_one.submit(5)
    assert full.value.retry_after_seconds >= 1
    assert with_one.stats()["requests_waiting"] == 3 and with_one.stats()["requests_running"] == 1
    held.let_all_go()
    assert [future.result(30) for future in (first, *others)] == [2, 4, 6, 8]
    assert held.batches == [[1], [2, 3], [4]]
    with_one.close()
    stats = with_one.stats()
    assert (stats["requests"], stats["rejected"], stats["finished_stop"]) == (4, 1, 4)
    assert (stats["steps"], stats["rows"], stats["requests_waiting"]) == (3, 4, 0)
    histograms = with_one.histograms()
    assert sum(histograms["request_seconds"].counts) == sum(histograms["queue_seconds"].counts) == 4
    assert histograms["rows_per_step"].total == 4


def test_items_of_one_request_come_back_in_order_and_batches_hold_the_padded_cost(held: Held) -> None:
    held.let_all_go()
    queue = BatchQueue("doubles", held, batch=40, cost=lambda item: item, unit="prompt_tokens")
    assert queue.submit_all([30, 5, 100, 20, 10]).result(30) == [60, 10, 200, 40, 20]
    assert held.batches == [[5, 10], [20], [30], [100]]  # ascending; a lone item may cost more than a batch
    assert queue.submit_all([]).result(30) == []
    assert queue.stats()["prompt_tokens"] == 165
    queue.close()


def test_a_long_request_does_not_hold_up_a_short_one(held: Held) -> None:
    queue = BatchQueue("doubles", held, batch=2)
    long = queue.submit_all(list(range(20, 30)))
    held.entered.acquire()
    short = queue.submit(1)
    held.go.release(3)  # the first, one that was next already, and one with the short request
    assert short.result(30) == 2 and not long.done()
    held.let_all_go()
    assert long.result(30) == [2 * item for item in range(20, 30)]
    queue.close()


def test_items_of_unlike_cost_share_no_batch(held: Held) -> None:
    queue = BatchQueue("doubles", held, batch=1000, cost=lambda item: item)
    queue.submit(7)
    held.entered.acquire()
    futures = [queue.submit(item) for item in (100, 60, 3)]
    held.let_all_go()
    wait(futures, 30)
    queue.close()
    assert held.batches == [[7], [100, 60], [3]]  # 3 would be padded to 100


def test_a_failing_request_fails_alone_and_the_thread_lives_on(held: Held) -> None:
    queue = BatchQueue("doubles", held, batch=8)
    queue.submit(1)
    held.entered.acquire()
    good, bad, panic = queue.submit(2), queue.submit(13), queue.submit(666)
    held.let_all_go()
    assert good.result(30) == 4
    with pytest.raises(ConfigError, match="13 has no double"):
        bad.result(30)
    with pytest.raises(RuntimeError, match="BaseException: a library in another language gave up"):
        panic.result(30)
    with pytest.raises(ConfigError):
        queue.submit_all([1, 13]).result(30)
    assert queue.submit(3).result(30) == 6
    assert queue.stats()["finished_error"] == 3
    queue.close()


def test_too_few_answers_are_an_error() -> None:
    queue = BatchQueue("short", lambda items: items[1:])
    with pytest.raises(RuntimeError, match="gave 0 answers"):
        queue.submit(1).result(30)
    queue.close()


def test_stopped_and_cancelled_requests_never_run(held: Held) -> None:
    queue = BatchQueue("doubles", held, batch=1)
    stop, halfway = threading.Event(), threading.Event()
    begun = queue.submit_all([1, 2, 3], halfway)
    held.entered.acquire()
    stopped, cancelled, kept = queue.submit(40, stop), queue.submit(50), queue.submit(60)
    stop.set()
    halfway.set()
    assert cancelled.cancel()
    held.let_all_go()
    assert kept.result(30) == 120
    for future in (begun, stopped):
        with pytest.raises(EngineClosed, match="was stopped"):
            future.result(30)
    with pytest.raises(CancelledError):
        cancelled.result(30)
    queue.close()
    assert held.batches == [[1], [60]] and queue.stats()["finished_cancelled"] == 3


def test_draining_ends_what_is_under_way_and_takes_nothing_new(held: Held) -> None:
    queue = BatchQueue("doubles", held)
    future = queue.submit(1)
    held.let_all_go()
    assert queue.drain(30) and future.result(30) == 2
    with pytest.raises(EngineClosed, match="takes no new requests"):
        queue.submit(2)
    queue.close()


def test_what_outlasts_the_drain_is_ended_and_so_is_what_waits_at_close(held: Held) -> None:
    queue = BatchQueue("doubles", held, batch=1)
    running = queue.submit(1)
    held.entered.acquire()
    waiting = queue.submit(2)
    assert not queue.drain(0.01)
    held.let_all_go()
    assert running.result(30) == 2
    with pytest.raises(EngineClosed):
        waiting.result(30)
    queue.close()
    queue.close()
