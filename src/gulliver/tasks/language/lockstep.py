"""Writing many texts at once with a network that only transformers runs.

All texts have one length at every step, so that one cache of whatever kind serves them all, without padding: a text
whose prompt is longer than another's is given its next token, in place of one that is drawn. So is a text in which a
question ended: what the chat template puts before the answer is given, and then the answer is drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gulliver.core.errors import ArtifactError
from gulliver.runtime.reference_cache import Lockstep
from gulliver.runtime.sampling import Sampler, Sampling


class Row:
    """A text that begins with `prompt` and is drawn by `sampling`.

    `turn`: from the text when it ends, the tokens that follow, or None; what comes after them is drawn by `later`.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        turn: Callable[[Sequence[int]], Sequence[int] | None] | None,
        later: Sampling,
    ) -> None:
        self._given = deque(prompt)
        self._sampling, self._turn, self._later = sampling, turn, later
        self._sampler: Sampler | None = None
        self._drawn = 0
        self._read: list[int] = []
        self._end: int | None = None

    @property
    def tokens(self) -> list[int]:
        """The text so far."""
        return self._read[: self._end]

    @property
    def read(self) -> Sequence[int]:
        """The text so far, and a filler for every step since it ended."""
        return self._read

    @property
    def given(self) -> int:
        """How many tokens are there to be read before one is drawn."""
        return len(self._given)

    @property
    def done(self) -> bool:
        """Whether the text has ended."""
        return self._end is not None

    def give(self, count: int) -> None:
        """Read the next `count` tokens of those that are given."""
        self._read += [self._given.popleft() for _ in range(count)]

    def take(self, logits: NDArray[np.float32], ends: Collection[int]) -> None:
        """One token more: a given one, or one drawn from its logits [vocabulary]; one of `ends` is not kept."""
        if not self._given and not self.done:
            self._draw(logits, ends)
        self._read.append(self._given.popleft() if self._given else self._read[-1])

    def _draw(self, logits: NDArray[np.float32], ends: Collection[int]) -> None:
        if self._sampler is None:
            self._sampler = Sampler(self._sampling, len(logits), ())
        token = self._sampler.draw(logits)
        if token not in ends:
            self._given.append(token)
            self._drawn += 1
            return
        follows = self._turn(self._read) if self._turn is not None and self._drawn else None
        if follows is None:
            self._end = len(self._read)
        else:
            self._given.extend(follows)
            self._sampling, self._sampler, self._turn = self._later, None, None


def write_in_step(step: Lockstep, rows: Sequence[Row], tokens: int, ends: Collection[int]) -> Iterator[float]:
    """Write `rows` to their ends or to `tokens` tokens; yields the share that is written, after every step.

    ArtifactError when the network's logits are not finite.
    """
    step.forget()
    shortest = min(row.given for row in rows)
    for row in rows:
        row.give(shortest)
    for length in range(shortest, tokens):
        if all(row.done for row in rows):
            break
        logits = step.read([row.read for row in rows]).numpy()
        if not np.isfinite(logits).all():
            raise ArtifactError("the model's logits are not finite while it writes text; its weights may be damaged")
        for row, mine in zip(rows, logits, strict=True):
            row.take(mine, ends)
        yield sum(tokens if row.done else length + 1 for row in rows) / (tokens * len(rows))
