"""The completions of one HTTP request: hand them to an engine, take what it delivers, cancel them.

An engine delivers in its own thread, at every step, up to a batch of pieces. The thread needs its core for arithmetic,
so crossing over to the event loop must be cheap: pieces go into a deque, and the loop is woken once for all of
them. An answer that is not streamed wakes the loop at its end alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.types import Receive

from gulliver.core.errors import GulliverError, first_line
from gulliver.runtime.batching.grammar import STUCK
from gulliver.runtime.batching.records import EngineClosed, Piece, QueueFull, Request
from gulliver.serve.errors import ApiError, bad_request, draining, engine_failed, refused, timed_out
from gulliver.serve.inference.future import disconnected

IN_FLIGHT = 16  # completions of one HTTP request with the engine at one time: a long list must not fill the queue
RETRY_SECONDS = 0.2
LATE_SECONDS = 1.0  # how long after its time an engine may take to say that a request is over; then it is over here


class Bridge:
    """Carries pieces from engines' threads to one event loop: one wake-up, however many pieces a step brings."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[tuple[Generation, int, Piece]] = deque()
        self._woken = False

    def bind(self) -> None:
        """Deliver to the running event loop."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._woken = loop, False

    def post(self, run: Generation, index: int, piece: Piece) -> None:
        """Called in any thread. The flag is set after the piece is appended, so no piece is left behind."""
        self._waiting.append((run, index, piece))
        if not self._woken:
            self._woken = True
            assert self._loop is not None, "no request was started"
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._woken = False
        waiting = self._waiting
        while waiting:
            run, index, piece = waiting.popleft()
            run.arrive(index, piece)


class Generation:
    """Some requests to one engine, answered together. Everything but `_deliver` happens in the event loop."""

    def __init__(
        self, engine: Any, requests: Sequence[Request], bridge: Bridge, streamed: bool, timeout_seconds: float
    ) -> None:
        self.requests = requests
        self.streamed = streamed
        self.last: list[Piece | None] = [None] * len(requests)  # the piece that ended each
        self.first_token: float | None = None  # when the first text of all came, on the monotonic clock, in seconds
        self.gone = False  # whether the client disconnected
        self._engine = engine
        self._bridge = bridge
        self._pending = deque(range(len(requests)))
        self._tickets: dict[int, Any] = {}
        self._arrived: list[tuple[int, Piece]] = []
        self._left = len(requests)
        self._end = time.monotonic() + timeout_seconds
        self._waiter: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Submit the first. ApiError (429, 503, 400) when one is refused; none is then left with the engine."""
        self._bridge.bind()
        try:
            self._submit()
        except GulliverError as error:
            self.cancel()
            raise refused(error) from None

    async def take(self) -> list[tuple[int, Piece]]:
        """Every (index, piece) that arrived since the last call; waits for one, or without a stream for the end of all.

        Empty only at the end. An engine that says nothing, because its thread died or hangs, cannot hold it past the
        time limit.
        """
        if self._left and not (self.streamed and self._arrived):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(max(self._end + LATE_SECONDS - time.monotonic(), 0.0)):
                    await self._waiter
            except TimeoutError:
                self._abandon()
            finally:
                self._waiter = None
        arrived, self._arrived = self._arrived, []
        return arrived

    def cancel(self) -> None:
        """End what is under way; what waits is never submitted. The engine still delivers a last piece for each."""
        self._give_up("cancelled")
        for ticket in list(self._tickets.values()):
            ticket.cancel()

    async def watch(self, receive: Receive) -> None:
        """Cancel when the client disconnects."""
        await disconnected(receive)
        if self._left:
            self.gone = True
            self.cancel()

    def _deliver(self, index: int, piece: Piece) -> None:
        """In the engine's thread."""
        if self.first_token is None and piece.completion_tokens:
            self.first_token = time.monotonic()
        if not self.streamed and piece.finish is None:
            self._arrived.append((index, piece))
            return
        self._bridge.post(self, index, piece)

    def arrive(self, index: int, piece: Piece) -> None:
        """A piece has come over to the event loop."""
        if self.last[index] is not None:
            return  # it came after it was given up
        self._arrived.append((index, piece))
        if piece.finish is not None:
            self._tickets.pop(index, None)
            self.last[index] = piece
            self._left -= 1
            self._submit_more()
        waiter = self._waiter
        if waiter is not None and not waiter.done() and (self.streamed or not self._left):
            waiter.set_result(None)

    def _submit(self) -> None:
        while self._pending and len(self._tickets) < IN_FLIGHT:
            left, index = self._end - time.monotonic(), self._pending[0]
            if left <= 0:
                self._give_up("timeout")
                return
            request = replace(self.requests[index], timeout_seconds=left)
            try:
                self._tickets[index] = self._engine.submit(request, partial(self._deliver, index))
            except QueueFull:
                if self._tickets:
                    return
                raise
            self._pending.popleft()

    def _submit_more(self) -> None:
        """Submit more in place of what ended; a full queue is tried again, a closed one ends the rest."""
        if not self._pending:
            return
        try:
            self._submit()
        except QueueFull:
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._submit_more)
        except EngineClosed:
            self._give_up("cancelled")
        except BaseException as error:  # a library's too: whoever waits for this completion must be told
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self._give_up(f"error: {first_line(error)}")

    def _abandon(self) -> None:
        """End what the engine did not end in time."""
        self.cancel()
        for index, piece in enumerate(self.last):
            if piece is None:
                self.arrive(index, Piece("", finish="timeout"))

    def _give_up(self, reason: str) -> None:
        """End what was never submitted."""
        pending, self._pending = self._pending, deque()
        for index in pending:
            self.arrive(index, Piece("", finish=reason))


def failure_of(piece: Piece) -> ApiError | None:
    """The error by which a piece ends its completion; None when it does not end it, or regularly."""
    reason = piece.finish
    if reason in (None, "stop", "length"):
        return None
    if reason == "timeout":
        return timed_out()
    if reason == "cancelled":
        return draining()
    if reason.startswith(f"error: {STUCK}"):  # a schema that leads nowhere: the fault of the request
        return bad_request(reason.removeprefix("error: "), code="grammar_failed")
    return engine_failed(reason.partition(": ")[2])
