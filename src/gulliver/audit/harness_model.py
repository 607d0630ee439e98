"""What a harness asks of a language model, answered by a decoder: log-likelihoods of texts, and greedy continuations.

With context tokens c and answer tokens a, the log-likelihood is sum_k log p(a_k | c, a_<k). The whole is tokenized at
once, and the tokens after those that it shares with the context alone are the answer's. What a request shares with the
one before it stays in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gulliver.core.errors import ConfigError
from gulliver.runtime.decoder import Decoder, StepBatch
from gulliver.runtime.text.tokenizer import Text

MAX_TOKENS = 256
"""Tokens of a continuation when a task does not say."""


class Scorer:
    """One decoder, one sequence at a time."""

    def __init__(self, decoder: Decoder, text: Text) -> None:
        self.decoder, self.text = decoder, text
        self.limit = min(decoder.positions, decoder.cache_blocks * decoder.block_tokens)
        self._cached: list[int] = []
        blocks = -(-self.limit // decoder.block_tokens)
        self._blocks = np.arange(blocks, dtype=np.int32)[None]

    # ---- texts --------------------------------------------------------------------------------------------------
    def loglikelihood(self, context: str, answer: str) -> tuple[float, bool]:
        """(log-likelihood of `answer` after `context`, whether every token of it is the likeliest)."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, answer = context[:-spaces], context[-spaces:] + answer
        before, whole = self.text.encode(context), self.text.encode(context + answer)
        pairs = enumerate(zip(before, whole, strict=False))
        first = next((at for at, (one, other) in pairs if one != other), min(len(before), len(whole)))
        return self._scored(whole, first)

    def rolling(self, text: str) -> float:
        """Log-likelihood of the whole text: each token once, after as many before it as the model reads.

        A text that is longer is read in strides of half of what the model reads.
        """
        tokens, total, done = self.text.encode(text), 0.0, 0
        while done < len(tokens):
            start = 0 if len(tokens) <= self.limit - 1 else max(0, done - self.limit // 2)
            part = tokens[start : start + self.limit - 1]
            total += self._scored(part, done - start)[0]
            done = start + len(part)
        return total

    def continued(self, context: str, stops: Sequence[str], max_tokens: int | None) -> str:
        """The greedy continuation of `context`, to the first of `stops`, an end token or `max_tokens`."""
        wanted = min(max_tokens or MAX_TOKENS, self.limit - 1)
        tokens = self._begun(self.text.encode(context))[-(self.limit - wanted) :]
        written: list[int] = []
        for _ in range(wanted):
            token = int(self._logits([*tokens, *written], len(tokens) + len(written) - 1)[-1].argmax())
            if token in self.text.end_tokens:
                break
            written.append(token)
            shown = self.text.decode(written)
            found = [shown.index(stop) for stop in stops if stop and stop in shown]
            if found:
                return shown[: min(found)]
        return self.text.decode(written)

    # ---- tokens -------------------------------------------------------------------------------------------------
    def _begun(self, tokens: list[int]) -> list[int]:
        """The tokens, or the one that begins a text where there are none to continue."""
        return tokens or [min(self.text.end_tokens, default=0)]

    def _scored(self, tokens: list[int], first: int) -> tuple[float, bool]:
        """(log-likelihood, all likeliest) of the tokens from `first` on; beginnings that do not fit are cut off."""
        if first == 0:
            tokens, first = [*self._begun([]), *tokens], 1
        cut = max(0, len(tokens) - self.limit)
        tokens, first = tokens[cut:], max(1, first - cut)
        if first >= len(tokens):
            return 0.0, True
        logits = self._logits(tokens[:-1], first - 1)
        targets = np.array(tokens[first:])
        highest = logits.max(1, keepdims=True)
        log = logits - highest - np.log(np.exp(logits - highest).sum(1, keepdims=True))
        likely = log[np.arange(len(targets)), targets]
        return float(likely.sum()), bool((logits.argmax(1) == targets).all() and np.isfinite(likely).all())

    def _logits(self, tokens: list[int], first: int) -> np.ndarray:
        """Logits after each of the tokens from `first` on, float64 [tokens - first, vocabulary]."""
        pairs = enumerate(zip(self._cached, tokens, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), min(len(self._cached), len(tokens)))
        start, found = min(same, first), []
        while start < len(tokens):
            part = np.array(tokens[start : start + self.decoder.max_rows], np.int32)
            positions = np.arange(start, start + len(part), dtype=np.int32)
            wanted = np.flatnonzero(positions >= first).astype(np.int32)
            step = StepBatch(part, positions, np.zeros(len(part), np.int32), self._blocks, wanted)
            found.append(self.decoder.step(step).astype(np.float64))
            start += len(part)
        self._cached = list(tokens)
        return np.concatenate(found)


def check_greedy(settings: dict[str, object]) -> None:
    """ConfigError for a task that draws its answers, which no two runs would give alike."""
    if settings.get("do_sample") or float(str(settings.get("temperature") or 0)) > 0:
        raise ConfigError("the task draws its answers at random (do_sample); only greedy tasks are measured")
