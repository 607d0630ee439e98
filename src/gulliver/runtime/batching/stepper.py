"""One step of an engine: ask the decoder, draw tokens, deliver what has become certain, end what has ended.

All of it happens in the engine's thread. What goes wrong with one request ends that request; what goes wrong in the
decoder ends the requests that were in the step.
"""

from __future__ import annotations

import logging
import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from gulliver.core.errors import ArtifactError, GulliverError
from gulliver.runtime.batching.counters import Counters
from gulliver.runtime.batching.records import Piece
from gulliver.runtime.batching.scheduler import Chunk, Scheduler
from gulliver.runtime.batching.sequence import Sequence as Running
from gulliver.runtime.decoder import Decoder

log = logging.getLogger("gulliver.serve")


class Stepper:
    """Runs the steps that a scheduler plans. `waiting` are the requests that are not in the batch yet."""

    def __init__(self, decoder: Decoder, scheduler: Scheduler, waiting: deque[Running], counters: Counters) -> None:
        self.decoder = decoder
        self.scheduler = scheduler
        self.waiting = waiting
        self.counters = counters

    def run(self, parts: list[Chunk]) -> None:
        """Ask the decoder once; draw and deliver for every sequence of the step. An exception is the decoder's."""
        counters, now = self.counters, time.monotonic()
        for part in parts:
            if not part.sequence.begun:
                part.sequence.begun = True
                counters.queue_seconds.add(now - part.sequence.submitted)
                counters.prompt_tokens += part.sequence.prompt_length
        batch = self.scheduler.batch(parts)
        logits = self.decoder.step(batch)
        best = logits.argmax(axis=1)
        finite = np.isfinite(logits[np.arange(len(best)), best])  # argmax finds NaN and infinity first
        all_finite, choices = bool(finite.all()), best.tolist()
        now, row = time.monotonic(), 0
        for part in parts:
            stop = row + part.wanted
            try:
                if not all_finite and not finite[row:stop].all():
                    raise ArtifactError("the model's logits are not finite; its file is damaged: see gulliver verify")
                self._advance(part, logits[row:stop], choices[row:stop], now)
            except BaseException as error:  # a library in another language may raise past Exception
                self._fail(part.sequence, error)
            row = stop
        rows = len(batch.tokens)
        counters.steps += 1
        counters.rows += rows
        counters.rows_per_step.add(rows)

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
            self._count(running, drawn, before == running.prompt_length, now)
            running.computed += drawn - 1
        self.scheduler.publish(running)
        piece = running.piece()
        if running.finish is not None:
            self._leave(running, now)
        if piece is not None:
            self._deliver(running, piece)

    def _draw(self, part: Chunk, logits: NDArray[np.float32], choices: list[int]) -> int:
        """Draw the next tokens of a sequence; returns how many."""
        running, draft = part.sequence, part.draft
        first = len(choices) - 1 - len(draft)  # the row of the last token that is not a draft
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

    def _count(self, running: Running, drawn: int, first: bool, now: float) -> None:
        counters = self.counters
        if first:
            counters.cached_tokens += running.cached
            counters.first_token_seconds.add(now - running.submitted)
        else:
            counters.between_tokens_seconds.add(now - running.last_time)
        counters.drawn(drawn)
        running.last_time = now

    # ---- ends ----
    def sweep(self) -> None:
        """End what was cancelled or took too long."""
        now = time.monotonic()
        for running in [*self.scheduler.running, *self.waiting]:
            if running.cancelled or now >= running.deadline:
                self.end(running, "cancelled" if running.cancelled else "timeout")

    def _leave(self, running: Running, now: float) -> None:
        if running.slot >= 0:
            self.scheduler.leave(running)
        else:
            self.waiting.remove(running)
        assert running.finish is not None
        self.counters.finish(running.finish, now, running.submitted)

    def end(self, running: Running, reason: str) -> None:
        """End a request from outside; what was held back is delivered."""
        running.answer.end()
        running.finish = reason
        self._leave(running, time.monotonic())
        piece = running.piece()
        assert piece is not None
        self._deliver(running, piece)

    def _deliver(self, running: Running, piece: Piece) -> None:
        running.ended = piece.finish is not None
        try:
            running.deliver(piece)
        except BaseException:  # as above
            log.exception("a request was cancelled because its pieces could not be delivered")
            running.cancelled = True

    def _fail(self, running: Running, error: BaseException) -> None:
        """End one request by an error: its own fault, or that of a damaged file."""
        if not isinstance(error, GulliverError):
            log.error("a request failed", exc_info=error)
        if running.finish is None or running.slot >= 0:
            self.end(running, f"error: {error}" if str(error) else f"error: {type(error).__name__}")

    def lose(self, error: BaseException) -> None:
        """End every request by an error when nothing else is certain any more: neither their state nor the cache's."""
        lost = list(self.scheduler.running)
        while self.waiting:  # one by one: others come meanwhile
            lost.append(self.waiting.popleft())
        now = time.monotonic()
        for running in (one for one in lost if not one.ended):
            running.finish = f"error: the engine failed ({type(error).__name__}) and began anew"
            self.counters.finish(running.finish, now, running.submitted)
            self._deliver(running, Piece("", finish=running.finish, prompt_tokens=running.prompt_length))

    def fail_all(self, error: BaseException) -> None:
        """End every running request, after a failure that may concern any of them; the cache is in doubt."""
        log.error("a step failed", exc_info=error)
        for running in list(self.scheduler.running):
            self._fail(running, error)
        self.scheduler.pool.forget()
