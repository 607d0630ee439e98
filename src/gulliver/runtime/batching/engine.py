"""Continuous batching: one Engine owns one decoder and one thread; requests join and leave at every step.

A step takes one token of every sequence that is being continued (and its draft), and a share of the prompts that wait
(scheduler.py), asks the decoder once, draws a token for every sequence whose logits came, and delivers what has
become certain text (stepper.py). The thread outlives what goes wrong in a request or a step; whatever else goes wrong
ends all requests by an error, and it begins anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.counters import Counters, Histogram, seconds_for
from gulliver.runtime.batching.grammar import Grammars
from gulliver.runtime.batching.records import EngineClosed, EngineLost, Piece, QueueFull, Request, TokenChoice
from gulliver.runtime.batching.scheduler import Scheduler
from gulliver.runtime.batching.sequence import Sequence as Running
from gulliver.runtime.batching.stepper import Stepper
from gulliver.runtime.decode import open_decoder
from gulliver.runtime.decoder import Decoder
from gulliver.runtime.sampling import Sampling
from gulliver.runtime.text.tokenizer import Text

__all__ = ["Engine", "EngineClosed", "Piece", "QueueFull", "Request", "Sampling", "TokenChoice"]

LAST_SECONDS = 10.0  # how long `drain` waits, after its time is up, for cancelled requests to end
CLOSE_SECONDS = 60.0  # how long `close` waits for a step to end
ALIVE_SECONDS = 1.0  # how often those that wait for an answer look whether the engine's thread lives
log = logging.getLogger("gulliver.serve")


class Engine:
    """Answers requests with one decoder.

    `name`: what clients call the model; `slots`: most sequences in one step; `queue`: most requests that wait;
    `prompt_rows`: most prompt tokens of a step while others are being continued (else the decoder's `max_rows`);
    `lookup`: whether drafts are made, in steps of at most `lookup_rows` rows; `reuse`: whether prompts that begin alike
    are computed once, for which `kept_tokens` of ended requests are kept in the cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        text: Text,
        name: str = "model",
        *,
        slots: int = 16,
        queue: int = 256,
        prompt_rows: int = 64,
        lookup: bool = True,
        lookup_rows: int = 8,
        reuse: bool = True,
        kept_tokens: int = 8192,
    ) -> None:
        self.name = name
        self.text = text
        self.decoder = decoder
        self.grammars = Grammars(text.tokenizer, decoder.vocabulary, text.end_tokens)
        self.counters = Counters()
        slots = min(slots, decoder.max_rows)
        kept_tokens = kept_tokens if reuse and decoder.shares_blocks else 0
        self._limits = slots, prompt_rows, lookup_rows if lookup else 0, kept_tokens
        self._queue = queue
        self._waiting: deque[Running] = deque()
        self._begin()
        self.context = text.context = self._scheduler.context  # longest prompt + completion, in tokens
        self._changed = threading.Condition()  # guards _waiting's growth, _draining, _closing
        self._draining = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        """With an empty cache and nothing that runs."""
        self._scheduler = Scheduler(self.decoder, *self._limits)
        self._stepper = Stepper(self.decoder, self._scheduler, self._waiting, self.counters)

    # ---- for other threads ----
    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Running:
        """Queue a request. `deliver` is called from the engine's thread and must return at once.

        `cancel` of what is returned may be called at any time from any thread, also after the end.
        QueueFull when too many wait; EngineClosed while draining; ConfigError when the request does not fit the model.
        An exception in `deliver` cancels the request.
        """
        running = self._checked(request, deliver)
        with self._changed:
            if len(self._waiting) >= self._queue and not self._draining:
                self.counters.rejected += 1
                now = time.monotonic()
                raise QueueFull(len(self._waiting), seconds_for(len(self._waiting), self.counters.ends, now))
            self._enqueue(running)
        return running

    def stream(self, request: Request) -> Iterator[Piece]:
        """Submit, then yield the pieces as they come; leaving the loop early cancels."""
        pieces: SimpleQueue[Piece] = SimpleQueue()
        return _pieces(self, self.submit(request, pieces.put), pieces)

    def complete(self, requests: Sequence[Request]) -> list[list[Piece]]:
        """All pieces of each request. Waits where the queue is full, so any number may be given."""
        under_way: list[Iterator[Piece]] = []
        for request in requests:
            pieces: SimpleQueue[Piece] = SimpleQueue()
            running = self._checked(request, pieces.put)
            with self._changed:
                while len(self._waiting) >= self._queue and not self._draining and self.alive:
                    self._changed.wait(ALIVE_SECONDS)
                self._enqueue(running)
            under_way.append(_pieces(self, running, pieces))
        return [list(answer) for answer in under_way]

    def _checked(self, request: Request, deliver: Callable[[Piece], None]) -> Running:
        prompt, vocabulary = request.prompt, self.decoder.vocabulary
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ConfigError(f"the prompt has token {wrong}; ids go from 0 to {vocabulary - 1}")
        room = self.context - len(prompt)
        wanted = max(room, 1) if request.max_tokens is None else request.max_tokens
        if wanted > room:
            answer = "an answer" if request.max_tokens is None else f"max_tokens of {wanted}"
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and {answer} do not fit the context of {self.context} tokens; "
                "shorten the prompt or lower max_tokens"
            )
        running = Running(request, deliver, self.text, vocabulary, len(prompt) + wanted, self._wake)
        self._scheduler.prepare(running)
        return running

    def _enqueue(self, running: Running) -> None:
        if self._draining or not self.alive:
            kind, what = (EngineClosed, "is shutting down") if self._draining else (EngineLost, "has lost its thread")
            raise kind(f"{self.name} {what} and takes no new requests")
        self.counters.requests += 1
        self._waiting.append(running)
        self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive()

    def stats(self) -> dict[str, float]:
        """Numbers as of now, by name.

        Gauges: requests_running, requests_waiting, cache_blocks_used, cache_blocks_total. Totals since the start:
        requests, rejected, finished_stop, finished_length, finished_cancelled, finished_timeout, finished_error, steps,
        rows, preemptions, restarts, prompt_tokens, cached_tokens (of those), completion_tokens, draft_offered,
        draft_accepted.
        """
        scheduler = self._scheduler
        self.counters.preemptions = scheduler.preempted
        gauges = {
            "requests_running": float(len(scheduler.running)),
            "requests_waiting": float(len(self._waiting)),
            "cache_blocks_used": float(scheduler.pool.used),
            "cache_blocks_total": float(scheduler.pool.count),
        }
        return gauges | self.counters.numbers()

    def histograms(self) -> dict[str, Histogram]:
        """first_token_seconds (from submit), between_tokens_seconds, queue_seconds, request_seconds, rows_per_step."""
        return self.counters.histograms()

    def drain(self, seconds: float) -> bool:
        """Take no new requests and let the others end; those that have not after `seconds` are cancelled.

        True when none had to be. `close` is still to be called.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            ended = self._changed.wait_for(self._idle, seconds)
            if not ended:
                for running in [*self._scheduler.running, *self._waiting]:
                    running.cancelled = True
                self._changed.notify_all()
                self._changed.wait_for(self._idle, LAST_SECONDS)
        return ended

    def close(self) -> None:
        """Cancel what runs, end the thread and free the decoder."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if not self.alive:  # else it is still in a step, which needs the decoder's memory
            self.decoder.close()

    def _idle(self) -> bool:
        return not self._waiting and not self._scheduler.running

    # ---- the engine's thread ----
    def _run(self) -> None:
        while True:
            try:
                self._steps()
                return
            except BaseException as error:  # a fault of ours, or what was thrown into the thread
                log.error("%s failed and begins anew", self.name, exc_info=error)
                self.counters.restarts += 1
                self._stepper.lose(error)
                self._begin()

    def _steps(self) -> None:
        """Step after step until the engine is closed."""
        scheduler = self._scheduler
        while True:
            with self._changed:
                if self._idle():
                    self._changed.notify_all()  # for drain
                self._changed.wait_for(lambda: self._closing or not self._idle())
                if self._closing:
                    break
            waiting = len(self._waiting)
            self._stepper.sweep()
            try:
                scheduler.admit(self._waiting)
                parts = scheduler.plan(self._waiting)
                if parts:
                    self._stepper.run(parts)
            except BaseException as error:  # the thread outlives whatever a decoder's library raises
                self._stepper.fail_all(error)
            if len(self._waiting) < waiting:
                self._wake()  # for complete
        for running in [*scheduler.running, *self._waiting]:
            self._stepper.end(running, "cancelled")


def load_engine(
    folder: Path,
    *,
    name: str | None = None,
    slots: int = 16,
    queue: int = 256,
    lookup: bool = True,
    reuse: bool = True,
    **options: Any,
) -> Engine:
    """An engine that answers for the model in `folder`, called `name` (the folder's own name when not given).

    `slots`, `queue`, `lookup` and `reuse` are Engine's; `options` (`threads`, `backend`, …) are `open_decoder`'s.
    ArtifactError when the folder holds no usable model, ConfigError when it cannot generate text.
    """
    if slots < 1:
        raise ConfigError(f"slots is {slots}; it must be at least 1")
    text = Text(folder)
    text.template.start()  # on another core, while the weights are opened
    decoder = open_decoder(folder, slots=slots, **options)
    return Engine(decoder, text, name or folder.name, slots=slots, queue=queue, lookup=lookup, reuse=reuse)


def _pieces(engine: Engine, ticket: Running, pieces: SimpleQueue[Piece]) -> Iterator[Piece]:
    """Pieces from a queue up to the one that ends their request; leaving early cancels it."""
    try:
        while True:
            try:
                piece = pieces.get(timeout=ALIVE_SECONDS)
            except Empty:
                if not engine.alive and pieces.empty():
                    raise EngineLost(f"{engine.name} has lost its thread; the answer does not come") from None
                continue
            yield piece
            if piece.finish is not None:
                return
    finally:
        ticket.cancel()
