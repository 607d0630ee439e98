"""The order of training examples: epochs over all of them, each shuffled by (seed, epoch) alone, so any run resumes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np


def shuffled(count: int, batch_size: int, seed: int, step: int) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (epoch, item) from `step` on; every item once per epoch, order from (seed, epoch)."""
    while True:
        places = [divmod(place, count) for place in range(step * batch_size, (step + 1) * batch_size)]
        yield [(epoch, int(_permutation(seed, epoch, count)[place])) for epoch, place in places]
        step += 1


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 1]).permutation(count)
