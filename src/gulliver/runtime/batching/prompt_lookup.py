"""Prompt lookup: what followed an earlier occurrence of the last words is offered as a draft of what comes next.

A language model often repeats its prompt or itself (names, quotations, code, lists). The continuation of the latest
earlier occurrence of the last three tokens, else of the last two, is put into the same step as further rows; the
model's own choice at each row is drawn as always, and the draft counts as far as it agrees. So the answer is the one
without drafts, in fewer steps. (Prompt lookup decoding, Saxena 2023; the check is exact because a draft is a guess at
a draw that is made anyway: no draw depends on the draft.)
"""

from __future__ import annotations

LONGEST = 3
SHORTEST = 2
MOST_DRAFT = 16
MIN_RATE = 0.3  # share of drafted tokens that must have come true lately; below it, drafting rests
REST = 32  # tokens that drafting rests for the first time; twice as many each time after that, up to `MOST_REST`
MOST_REST = 512


class Lookup:
    """The drafts of one sequence."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence was followed
        self._indexed = 0  # n-grams that end before this place are in `_after`
        self._rate = 0.6
        self._length = 4
        self._rest = REST
        self._resume = 0  # no draft while the sequence is shorter

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`; none when nothing is found or drafting rests."""
        count = len(tokens)
        if count < self._resume or count < SHORTEST or most < 1:
            return []
        self._index(tokens)
        place = self._after.get(tuple(tokens[-LONGEST:])) or self._after.get(tuple(tokens[-SHORTEST:]))
        if not place:
            return []
        length = min(self._length, most)
        found = tokens[place : place + length]
        while len(found) < length:  # the occurrence reaches to the end: what repeats is taken to repeat on
            found.append(found[place + len(found) - count])
        return found

    def result(self, offered: int, accepted: int, count: int) -> None:
        """Learn what became of a draft: `accepted` of `offered` tokens came true; the sequence has `count` now."""
        self._rate += (accepted / offered - self._rate) * 0.25
        if accepted == offered:
            self._length = min(2 * self._length, MOST_DRAFT)
        else:
            self._length = max(2, min(self._length, accepted + 2))
        if self._rate < MIN_RATE:
            self._resume = count + self._rest
            self._rest = min(2 * self._rest, MOST_REST)
            self._rate = 0.6  # another chance that three failures end
        elif self._rate > 0.7:
            self._rest = REST

    def _index(self, tokens: list[int]) -> None:
        """Enter the n-grams that end before the last token: the last ones are what is looked for."""
        after = self._after
        for end in range(max(self._indexed, SHORTEST), len(tokens)):
            after[(tokens[end - 2], tokens[end - 1])] = end
            if end >= LONGEST:
                after[(tokens[end - 3], tokens[end - 2], tokens[end - 1])] = end
        self._indexed = len(tokens)
