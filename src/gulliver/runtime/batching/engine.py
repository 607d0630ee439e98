"""Continuous batching: one Engine owns one decoder and one thread; requests join and leave at every step.

A step takes one token of every sequence that is being continued (and its draft), and a share of the prompts that wait
(serve/schedule.py), asks the decoder once, draws a token for every sequence whose logits came, and delivers what has
become certain text. What goes wrong with one request ends that request alone; what goes wrong in the decoder ends the
requests that were in the step; the thread lives on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gulliver.core.errors import ConfigError, GulliverError
from gulliver.runtime.batching.counters import Counters, Histogram, seconds_for
from gulliver.runtime.batching.grammar import Grammars
from gulliver.runtime.batching.records import EngineClosed, Piece, QueueFull, Request, TokenChoice
from gulliver.runtime.batching.scheduler import Chunk, Scheduler
from gulliver.runtime.batching.sequence import Sequence as Running
from gulliver.runtime.decoder import Decoder
from gulliver.runtime.sampling import Sampling
from gulliver.runtime.text.tokenizer import Text

__all__ = ["Engine", "EngineClosed", "Piece", "QueueFull", "Request", "Sampling", "Ticket", "TokenChoice"]

LAST_SECONDS = 10.0
"""How long `drain` waits, after its time is up, for cancelled requests to end."""
log = logging.getLogger("gulliver.serve")


class Ticket(Protocol):
    """A request under way. `cancel` may be called at any time from any thread, also after the end."""

    def cancel(self) -> None: ...


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
        self._scheduler = Scheduler(decoder, slots, prompt_rows, lookup_rows if lookup else 0, kept_tokens)
        self.context = self._scheduler.context  # longest prompt + completion, in tokens
        self._queue = queue
        self._waiting: deque[Running] = deque()
        self._changed = threading.Condition()  # guards _waiting's growth, _arrivals, _draining, _closing
        self._arrivals = 0
        self._draining = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    # ---- for other threads ----
    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Ticket:
        """Queue a request. `deliver` is called from the engine's thread and must return at once.

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
        return _until_finish(self.submit(request, pieces.put), pieces)

    def complete(self, requests: Sequence[Request]) -> list[list[Piece]]:
        """All pieces of each request. Waits where the queue is full, so any number may be given."""
        queues: list[SimpleQueue[Piece]] = []
        for request in requests:
            queues.append(SimpleQueue())
            running = self._checked(request, queues[-1].put)
            with self._changed:
                self._changed.wait_for(lambda: len(self._waiting) < self._queue or self._draining)
                self._enqueue(running)
        return [list(_pieces(pieces)) for pieces in queues]

    def _checked(self, request: Request, deliver: Callable[[Piece], None]) -> Running:
        prompt, vocabulary = request.prompt, self.decoder.vocabulary
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ConfigError(f"the prompt holds token {wrong}; the vocabulary has {vocabulary}")
        room = self.context - len(prompt)
        wanted = room if request.max_tokens is None else request.max_tokens
        if wanted > room or (request.max_tokens is None and room < 1):
            answer = "an answer" if request.max_tokens is None else f"max_tokens of {wanted}"
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and {answer} do not fit the context of {self.context} tokens; "
                "shorten the prompt or lower max_tokens"
            )
        running = Running(request, deliver, self.text, vocabulary, len(prompt) + wanted, self._wake)
        self._scheduler.prepare(running)
        return running

    def _enqueue(self, running: Running) -> None:
        if self._draining:
            raise EngineClosed(f"{self.name} is shutting down and takes no new requests")
        running.number = self._arrivals
        self._arrivals += 1
        self.counters.requests += 1
        self._waiting.append(running)
        self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def stats(self) -> dict[str, float]:
        """Numbers as of now, by name.

        Gauges: requests_running, requests_waiting, cache_blocks_used, cache_blocks_total. Totals since the start:
        requests, rejected, finished_stop, finished_length, finished_cancelled, finished_timeout, finished_error, steps,
        rows, preemptions, prompt_tokens, cached_tokens (of those), completion_tokens, draft_offered, draft_accepted.
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
        self._thread.join()
        self.decoder.close()

    def _idle(self) -> bool:
        return not self._waiting and not self._scheduler.running

    # ---- the engine's thread ----
    def _run(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._changed:
                if self._idle():
                    self._changed.notify_all()  # for drain
                self._changed.wait_for(lambda: self._closing or not self._idle())
                if self._closing:
                    break
            waiting = len(self._waiting)
            self._sweep()
            try:
                scheduler.admit(self._waiting)
                parts = scheduler.plan(self._waiting)
                if parts:
                    self._step(parts)
            except Exception as error:
                self._fail_all(error)
            if len(self._waiting) < waiting:
                self._wake()  # for complete
        for running in [*scheduler.running, *self._waiting]:
            self._end(running, "cancelled")

    def _sweep(self) -> None:
        """End what was cancelled or took too long."""
        now = time.monotonic()
        for running in [*self._scheduler.running, *self._waiting]:
            if running.cancelled or now >= running.deadline:
                self._end(running, "cancelled" if running.cancelled else "timeout")

    def _step(self, parts: list[Chunk]) -> None:
        counters, now = self.counters, time.monotonic()
        for part in parts:
            if not part.sequence.begun:
                self._begin(part.sequence, now)
        batch = self._scheduler.batch(parts)
        logits = self.decoder.step(batch)
        best = logits.argmax(axis=1)
        finite = np.isfinite(logits[np.arange(len(best)), best])  # argmax finds NaN and infinity first
        all_finite, choices = bool(finite.all()), best.tolist()
        now, row = time.monotonic(), 0
        for part in parts:
            stop = row + part.wanted
            try:
                if not all_finite and not finite[row:stop].all():
                    raise _Damaged(
                        "the model's logits are not finite numbers; its file is damaged: check it with gulliver verify"
                    )
                self._advance(part, logits[row:stop], choices[row:stop], now)
            except Exception as error:
                self._fail(part.sequence, error)
            row = stop
        rows = len(batch.tokens)
        counters.steps += 1
        counters.rows += rows
        counters.rows_per_step.add(rows)

    def _begin(self, running: Running, now: float) -> None:
        running.begun = True
        self.counters.queue_seconds.add(now - running.submitted)
        self.counters.prompt_tokens += running.prompt_length

    def _advance(self, part: Chunk, logits: NDArray[np.float32], choices: list[int], now: float) -> None:
        """Take the logits of a part's wanted rows: draw tokens as far as the draft agrees, then deliver."""
        running, drawn = part.sequence, 0
        before = len(running.tokens)
        if running.echo and part.first < running.prompt_length:
            running.echo_rows(part.first, logits)
        running.computed = part.first + part.count - len(part.draft)
        if running.computed == before:
            if before < running.limit:
                drawn = self._draw(part, logits, choices)
            else:
                running.finish = "length"  # an echo that asked for no token
        if drawn:
            self._count_tokens(running, drawn, before == running.prompt_length, now)
            running.computed += drawn - 1
        self._scheduler.publish(running)
        piece = running.piece()
        if running.finish is not None:
            self._leave(running, now)
        if piece is not None:
            self._deliver(running, piece)

    def _draw(self, part: Chunk, logits: NDArray[np.float32], choices: list[int]) -> int:
        """Draw the next tokens of a sequence; returns how many."""
        running, draft = part.sequence, part.draft
        first = len(choices) - 1 - len(draft)  # the row of the last token that is no draft
        for place in range(len(draft) + 1):
            row = logits[first + place]
            token = running.choose(row, choices[first + place])
            running.push(token, row)
            if running.finish is not None or place == len(draft) or draft[place] != token:
                break
        if draft:
            accepted = place + (running.finish is not None and place < len(draft) and draft[place] == token)
            running.lookup.result(len(draft), accepted, len(running.tokens))
            self.counters.draft_offered += len(draft)
            self.counters.draft_accepted += accepted
        return place + 1

    def _count_tokens(self, running: Running, drawn: int, first: bool, now: float) -> None:
        counters = self.counters
        counters.completion_tokens += drawn
        if first:
            counters.cached_tokens += running.cached
            counters.first_token_seconds.add(now - running.submitted)
        else:
            counters.between_tokens_seconds.add(now - running.last_time)
        for _ in range(drawn - 1):  # a draft that came true comes all at once
            counters.between_tokens_seconds.add(0.0)
        running.last_time = now

    # ---- ends ----
    def _leave(self, running: Running, now: float) -> None:
        if running.slot >= 0:
            self._scheduler.leave(running)
        else:
            self._waiting.remove(running)
        assert running.finish is not None
        self.counters.finish(running.finish, now, running.submitted)

    def _end(self, running: Running, reason: str) -> None:
        """End a request from outside; what was held back is delivered."""
        running.answer.end()
        running.finish = reason
        self._leave(running, time.monotonic())
        piece = running.piece()
        assert piece is not None
        self._deliver(running, piece)

    def _deliver(self, running: Running, piece: Piece) -> None:
        try:
            running.deliver(piece)
        except Exception:
            log.exception("a request was cancelled, since its pieces could not be delivered")
            running.cancelled = True

    def _fail(self, running: Running, error: Exception) -> None:
        """End one request by an error; its own fault or a damaged file, nobody else's."""
        if not isinstance(error, GulliverError):
            log.error("a request failed", exc_info=error)
        if running.finish is None or running.slot >= 0:
            self._end(running, f"error: {error}" if str(error) else f"error: {type(error).__name__}")

    def _fail_all(self, error: Exception) -> None:
        """End every running request, after a failure that may concern any of them; the cache is in doubt."""
        log.error("a step failed", exc_info=error)
        for running in list(self._scheduler.running):
            self._fail(running, error)
        self._scheduler.pool.forget()


class _Damaged(GulliverError):
    """The model's own numbers are wrong."""


def _pieces(pieces: SimpleQueue[Piece]) -> Iterator[Piece]:
    """Pieces from a queue up to the one that ends its request."""
    while True:
        piece = pieces.get()
        yield piece
        if piece.finish is not None:
            return


def _until_finish(ticket: Ticket, pieces: SimpleQueue[Piece]) -> Iterator[Piece]:
    try:
        yield from _pieces(pieces)
    finally:
        ticket.cancel()
