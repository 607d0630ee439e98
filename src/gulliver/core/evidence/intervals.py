"""Intervals of shares: how many of n examples are right, and how many more of one model than of another.

Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927): centre
(p + z²/2n) / (1 + z²/n), half-width z · sqrt(p(1 - p)/n + z²/4n²) / (1 + z²/n). Agresti and Min, Simple improved
confidence intervals for comparing matched proportions, Statistics in Medicine 24 (2005): with b examples that only the
first gets right and c that only the second does, add 1/2 to each cell of the 2 x 2 table and take Wald's interval.
Neither has width zero where all agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson_interval(hits: int, n: int) -> tuple[float, float, float]:
    """(share, low, high) of `hits` among `n` >= 1."""
    share = hits / n
    scale = 1.0 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / scale
    half = Z * math.sqrt(share * (1.0 - share) / n + Z * Z / (4 * n * n)) / scale
    return share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def matched_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float, float]:
    """(difference, low, high) of the shares of True in `first` minus `second`, paired by position, n >= 1."""
    assert len(first) == len(second) > 0, (len(first), len(second))
    n = len(first)
    only_one = sum(bool(one) and not two for one, two in zip(first, second, strict=True))
    only_two = sum(bool(two) and not one for one, two in zip(first, second, strict=True))
    value = (only_one - only_two) / n
    centre = (only_one - only_two) / (n + 2)
    half = Z * math.sqrt(only_one + only_two + 1 - (only_one - only_two) ** 2 / (n + 2)) / (n + 2)
    return value, min(max(-1.0, centre - half), value), max(min(1.0, centre + half), value)
