"""How the next token is chosen from the logits, in numpy, without sorting a vocabulary.

Order, as in transformers: repetition, presence and frequency penalties; logit bias; grammar mask; temperature; top_k;
top_p (of what top_k left); min_p. Then one uniform number u in [0, 1) picks the first token, in order of ids, whose
cumulated probability exceeds u: a request uses exactly one number of its own random stream for each token, so that its
tokens are the same alone and in company, with drafts and without. Candidates are cut off first, by bounds that are
found by counting; only they are ever sorted.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gulliver.core.errors import ConfigError

FEW = 2048  # as many candidates are sorted and summed one by one
RUN = 256  # tokens whose probabilities are summed as one when more may be drawn


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ConfigError for a value that makes no sense."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # keep the fewest likeliest tokens that reach this probability together
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # divides (or multiplies) logits of tokens in the prompt or the answer
    presence_penalty: float = 0.0  # taken off the logits of tokens in the answer
    frequency_penalty: float = 0.0  # taken off for every occurrence of a token in the answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    seed: int | None = None  # None: drawn

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("temperature", 0 <= self.temperature <= 100, "lie between 0 (greedy) and 100"),
            ("top_k", self.top_k >= 0, "be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "lie above 0 and at most at 1"),
            ("min_p", 0 <= self.min_p <= 1, "lie between 0 and 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "lie between 0.01 and 100; 1 is none"),
            ("presence_penalty", abs(self.presence_penalty) <= 100, "lie between -100 and 100"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 100, "lie between -100 and 100"),
        ):
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must {rule}")
        for token, bias in self.logit_bias:
            if not math.isfinite(bias):
                raise ConfigError(f"logit_bias of token {token} is {bias}; it must be a finite number")

    @property
    def plain_greedy(self) -> bool:
        """Whether the token is just the one with the largest logit."""
        changed = self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return self.temperature == 0 and not changed


class Sampler:
    """Draws the tokens of one request, one after another."""

    def __init__(self, sampling: Sampling, vocabulary: int, prompt: Iterable[int]) -> None:
        self.sampling = sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**64
        self._random = np.random.Generator(np.random.PCG64(seed)).random if sampling.temperature > 0 else None
        self._bias: NDArray[np.float32] | None = None
        if sampling.logit_bias:
            self._bias = np.zeros(vocabulary, np.float32)
            for token, bias in sampling.logit_bias:
                if not 0 <= token < vocabulary:
                    raise ConfigError(f"logit_bias names token {token}; the vocabulary has {vocabulary}")
                self._bias[token] = bias
        self._counts: dict[int, int] = {}  # of the answer
        self._seen: dict[int, None] = dict.fromkeys(prompt) if sampling.repetition_penalty != 1 else {}
        penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1
        self._counting = any(penalties)

    def observe(self, token: int) -> None:
        """Tell the sampler the answer's next token, after each `draw`."""
        if self._counting:
            self._counts[token] = self._counts.get(token, 0) + 1
            self._seen[token] = None

    def draw(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token, by finite logits [vocabulary]; `allowed` [vocabulary] leaves some out.

        `logits` stays as it is.
        """
        if self._counting or self._bias is not None:
            logits = self._penalised(logits)
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
        if self._random is None:
            return int(logits.argmax())
        return pick(logits, self.sampling, self._random())

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        sampling, changed = self.sampling, logits.copy()
        if sampling.repetition_penalty != 1:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values, penalty = changed[seen], np.float32(sampling.repetition_penalty)
            changed[seen] = np.where(values > 0, values / penalty, values * penalty)
        if (sampling.presence_penalty or sampling.frequency_penalty) and self._counts:
            tokens = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            changed[tokens] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * counts
        if self._bias is not None:
            changed += self._bias
        return changed


def pick(logits: NDArray[np.float32], sampling: Sampling, uniform: float) -> int:
    """The token that `uniform` in [0, 1) picks of `logits` [vocabulary]; never one of -inf. Temperature is above 0."""
    best, tokens = float(logits.max()), None
    if sampling.top_k and sampling.top_k < len(logits):
        tokens = _top_k(logits, best, sampling.top_k)
        logits = logits[tokens]
    weights = _weights(logits, best, sampling.temperature)
    least = sampling.min_p
    if sampling.top_p < 1:
        least = max(least, _nucleus(weights, sampling.top_p))
    if least:
        kept = weights >= least
        if np.count_nonzero(kept) > FEW:
            weights *= kept
        else:
            places = np.flatnonzero(kept)
            weights, tokens = weights[places], places if tokens is None else tokens[places]
    place = _place(weights, uniform)
    return place if tokens is None else int(tokens[place])


def _weights(logits: NDArray[np.float32], best: float, temperature: float) -> NDArray[np.float32]:
    """Probabilities over that of the likeliest token: 0 to 1."""
    weights = logits - np.float32(best)
    if temperature != 1:
        with np.errstate(over="ignore"):  # far below the best, at a temperature near 0: -inf, weight 0
            weights /= np.float32(max(temperature, 1e-30))
    return np.exp(weights, out=weights)


def _place(weights: NDArray[np.float32], uniform: float) -> int:
    """The first place whose cumulated weight exceeds `uniform` of the whole; its own weight is never 0."""
    run, before = 0, 0.0
    if len(weights) > FEW:  # a cumulated sum over all is slow: over runs first, then inside one
        sums = np.add.reduceat(weights, np.arange(0, len(weights), RUN), dtype=np.float64).cumsum()
        wanted = uniform * sums[-1]
        run = min(int(sums.searchsorted(wanted, side="right")), len(sums) - 1)
        before = sums[run - 1] if run else 0.0
        weights = weights[run * RUN : (run + 1) * RUN]
        inside = weights.cumsum(dtype=np.float64)
    else:
        inside = weights.cumsum(dtype=np.float64)
        wanted = uniform * inside[-1]
    place = int(inside.searchsorted(wanted - before, side="right"))
    if place == len(inside):  # sums differ in their last bits: the last one with any weight
        place = int(np.flatnonzero(weights)[-1])
    return run * RUN + place


def _top_k(logits: NDArray[np.float32], best: float, count: int) -> NDArray[np.intp]:
    """The ids of the `count` largest logits and of those equal to the last."""
    near, gap = 0.0, 2.0  # more than `count` logits lie within `gap` of the best, fewer within `near`
    while np.count_nonzero(logits >= best - gap) < count:
        near, gap = gap, 2 * gap
        if gap > 64:
            gap = np.inf
            break
    for _ in range(6):  # few candidates are quickly sorted
        middle = (near + gap) / 2
        if gap == np.inf or np.count_nonzero(logits >= best - gap) <= 4 * count:
            break
        near, gap = (middle, gap) if np.count_nonzero(logits >= best - middle) < count else (near, middle)
    tokens = np.flatnonzero(logits >= best - gap)
    if len(tokens) <= count:
        return tokens
    values, place = logits[tokens], len(tokens) - count
    return tokens[values >= np.partition(values, place)[place]]


def _nucleus(weights: NDArray[np.float32], share: float) -> float:
    """The least of the fewest largest weights that make up `share` of all."""
    wanted = share * float(weights.sum(dtype=np.float64))
    if len(weights) > FEW:
        likely = weights[weights >= 0.01]
        if len(likely) > FEW or likely.sum(dtype=np.float64) < wanted:
            return _nucleus_of_many(weights, wanted)
        weights = likely
    down = np.sort(weights)[::-1]
    place = int(down.cumsum(dtype=np.float64).searchsorted(wanted))
    return float(down[min(place, len(down) - 1)])


def _nucleus_of_many(weights: NDArray[np.float32], wanted: float) -> float:
    """As `_nucleus`, by a histogram over the leading bits of the weights, which grow with their values."""
    bits = weights.view(np.int32) >> 18  # the exponent and five bits: steps of 3 %
    above = np.bincount(bits, weights)[::-1].cumsum()
    place = min(int(above.searchsorted(wanted)), len(above) - 1)
    down = np.sort(weights[bits == len(above) - 1 - place])[::-1]
    inside = down.cumsum(dtype=np.float64) + (above[place - 1] if place else 0.0)
    return float(down[min(int(inside.searchsorted(wanted)), len(down) - 1)])


def logprobs(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Natural log-probabilities of logits [vocabulary] or [rows, vocabulary]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def likeliest(values: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
    """The `count` largest of `values` [vocabulary] as (id, value), largest first, equal ones by id."""
    count = min(count, len(values))
    if count == 0:
        return []
    tokens = _top_k(values, float(values.max()), count)
    order = np.lexsort((tokens, -values[tokens]))[:count]
    return [(int(token), float(values[token])) for token in tokens[order]]
