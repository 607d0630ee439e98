"""The order of training examples: epochs over all of them, each shuffled by (seed, epoch) alone, so any run resumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    """Which examples are in which batch, from batch `step` on; with `once`, those of the first epoch alone."""

    batch_size: int
    seed: int
    step: int
    once: bool = False

    def batches(self, count: int, key: tuple[int, ...] = (1,)) -> Iterator[list[tuple[int, int]]]:
        """Endless batches of (epoch, item); every item once per epoch, order from (seed, epoch, *key).

        With `once` the last batch holds what is left, and is the last.
        """
        step = self.step
        while not self.once or step * self.batch_size < count:
            end = (step + 1) * self.batch_size
            places = [divmod(at, count) for at in range(step * self.batch_size, min(end, count) if self.once else end)]
            yield [(epoch, int(_permutation((self.seed, epoch, *key), count)[place])) for epoch, place in places]
            step += 1


@lru_cache(maxsize=4)
def _permutation(entropy: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(entropy).permutation(count)
