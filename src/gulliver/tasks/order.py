"""The order of training examples: epochs over all of them, each shuffled by (seed, epoch) alone, so any run resumes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np


def shuffled(
    count: int, batch_size: int, seed: int, step: int, key: tuple[int, ...] = (1,)
) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (epoch, item) from `step` on; every item once per epoch, order from (seed, epoch, *key)."""
    while True:
        places = [divmod(place, count) for place in range(step * batch_size, (step + 1) * batch_size)]
        yield [(epoch, int(_permutation((seed, epoch, *key), count)[place])) for epoch, place in places]
        step += 1


@lru_cache(maxsize=4)
def _permutation(entropy: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(entropy).permutation(count)
