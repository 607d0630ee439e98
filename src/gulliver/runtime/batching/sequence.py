"""One request under way: its tokens, its place in the cache, its random stream, and the text that is ready."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gulliver.runtime.batching.cache import Key, first_key, next_key
from gulliver.runtime.batching.prompt_lookup import Lookup
from gulliver.runtime.batching.records import Piece, Request, TokenChoice
from gulliver.runtime.sampling import Sampler, likeliest, logprobs
from gulliver.runtime.text.detokenizer import StopFinder
from gulliver.runtime.text.tokenizer import Text


class WrittenText:
    """The text of a completion token by token: what is certain, and the tokens that wrote it."""

    def __init__(self, text: Text, request: Request) -> None:
        self._table = text
        self._write = text.detokenizer(request.prompt).add
        self._stops = StopFinder(request.stop) if request.stop else None
        self._ready: list[str] = []
        self._tokens: list[TokenChoice] = []
        self._held: list[tuple[TokenChoice, int, int]] = []  # with a stop: token, where its text begins and ends
        self._written = 0  # characters, those held back included
        self._released = 0

    def add(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> bool:
        """Take the next token; True when it completes a stop text."""
        text = self._write(token)
        choice = TokenChoice(token, self._table.token_bytes(token), logprob, top)
        if self._stops is None:
            self._tokens.append(choice)
            self._ready.append(text)
            return False
        self._held.append((choice, self._written, self._written + len(text)))
        self._written += len(text)
        certain, met = self._stops.add(text)
        self._release(certain)
        if met:
            self._tokens += [choice for choice, begin, _ in self._held if begin < self._released]
            self._held = []
        return met

    def _release(self, text: str) -> None:
        self._ready.append(text)
        self._released += len(text)
        while self._held and self._held[0][2] <= self._released:
            self._tokens.append(self._held.pop(0)[0])

    def end(self) -> None:
        """No more tokens come and no stop text was met: what was held back is certain now."""
        if self._stops is not None:
            self._release(self._stops.rest())
            self._tokens += [choice for choice, _, _ in self._held]
            self._held = []

    def take(self) -> tuple[str, tuple[TokenChoice, ...]]:
        """What has become certain since the last call."""
        text, tokens = "".join(self._ready), tuple(self._tokens)
        self._ready, self._tokens = [], []
        return text, tokens


class Sequence:
    """A request with all that the engine knows of it. It is also the ticket by which it is cancelled."""

    def __init__(
        self,
        request: Request,
        deliver: Callable[[Piece], None],
        text: Text,
        vocabulary: int,
        limit: int,
        wake: Callable[[], None],
    ) -> None:
        """`limit`: most tokens, prompt and completion together. ConfigError when the sampling does not fit."""
        self.request = request
        self.deliver = deliver
        self.submitted = time.monotonic()
        self.deadline = self.submitted + (request.timeout_seconds or float("inf"))
        self.limit = limit
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.sampler = Sampler(request.sampling, vocabulary, request.prompt)
        self.matcher = request.grammar.matcher() if request.grammar is not None else None
        self.greedy = request.sampling.plain_greedy and self.matcher is None
        self.lookup = Lookup()
        self.answer = WrittenText(text, request)
        self.ends = frozenset(request.stop_tokens) | (frozenset() if request.ignore_end else text.end_tokens)
        self.finish: str | None = None
        self.cancelled = False
        self.ended = False  # its last piece was delivered
        self.begun = False  # was in a step
        self.restarted = False  # gave its cache blocks back once
        self.last_time = 0.0  # when the latest token came
        # the cache
        self.computed = 0  # tokens whose keys and values are in it
        self.blocks: list[int] = []
        self.slot = -1
        self.published = 0  # blocks
        self.cached = 0  # tokens of the prompt that were found
        self.keys: list[Key] = []
        # the prompt's logprobs
        self.echoed: list[TokenChoice] = []
        self.echo = request.echo_logprobs
        self._wake = wake
        self._text = text

    def cancel(self) -> None:
        """End the request; its last piece says "cancelled". Nothing happens when it has ended already."""
        self.cancelled = True
        self._wake()

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache yet; 1 for a sequence that is being continued."""
        return len(self.tokens) - self.computed

    def key(self, index: int, block_tokens: int) -> Key:
        """The key of a block whose tokens are all known."""
        while len(self.keys) <= index:
            place = len(self.keys) * block_tokens
            before = self.keys[-1] if self.keys else first_key(self.request.owner)
            self.keys.append(next_key(before, self.tokens[place : place + block_tokens]))
        return self.keys[index]

    def choose(self, logits: NDArray[np.float32], best: int) -> int:
        """Draw the next token from its finite logits [vocabulary], whose largest is at `best`."""
        if self.greedy:
            return best
        return self.sampler.draw(logits, self.matcher.allowed() if self.matcher is not None else None)

    def push(self, token: int, logits: NDArray[np.float32]) -> None:
        """Take the token that was drawn from `logits` [vocabulary]; sets `finish` when it is the last."""
        self.tokens.append(token)
        if token in self.ends:
            self.answer.end()
            self.finish = "stop"
            return
        self.sampler.observe(token)
        logprob, top = None, ()
        if self.request.top_logprobs is not None:
            logprob, top = _logprobs_of(token, logits, self.request.top_logprobs)
        met = self.answer.add(token, logprob, top)
        if self.matcher is not None and not met:
            self.matcher.accept(token)
            if self.matcher.finished:
                self.answer.end()
                met = True
        if met:
            self.finish = "stop"
        elif len(self.tokens) >= self.limit:
            self.answer.end()
            self.finish = "length"

    def echo_rows(self, first: int, logits: NDArray[np.float32]) -> None:
        """Take the logits [rows, vocabulary] of the prompt from position `first` on: a row tells of the next token."""
        if not self.echoed:
            self.echoed.append(TokenChoice(self.tokens[0], self._text.token_bytes(self.tokens[0])))
        top = self.request.top_logprobs or 0
        for row, position in enumerate(range(first, first + len(logits))):
            if len(self.echoed) == position + 1 < self.prompt_length:
                token = self.tokens[position + 1]
                logprob, others = _logprobs_of(token, logits[row], top)
                self.echoed.append(TokenChoice(token, self._text.token_bytes(token), logprob, others))

    def piece(self) -> Piece | None:
        """What is ready to be delivered, or None."""
        text, tokens = self.answer.take()
        prompt: tuple[TokenChoice, ...] = ()
        if self.echo and len(self.echoed) == self.prompt_length:
            prompt, self.echo = tuple(self.echoed), False
        if not text and not tokens and not prompt and self.finish is None:
            return None
        count = len(self.tokens) - self.prompt_length
        return Piece(text, tokens, self.finish, self.prompt_length, self.cached, count, prompt)


def _logprobs_of(token: int, logits: NDArray[np.float32], count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    values = logprobs(logits)
    return float(values[token]), tuple(likeliest(values, count))
