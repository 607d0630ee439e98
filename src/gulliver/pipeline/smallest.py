"""The size to try next when the smallest model within a loss is wanted.

The plan's frontier says how the loss falls with size, up to a factor; each measured round says the factor at one size.
In the logarithm of the loss the factors of measured rounds are joined by lines and kept constant outside, and the
smallest size whose corrected curve meets the limit, between the largest that failed and the smallest that passed, is
the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gulliver.core.records import Plan, PlannedPoint, Point

FIRST_SHARE = 0.3
"""Where the search begins, as a share of the parent's bytes: about 4.8 of 16 bits a weight."""
ROUNDS = 5
CLOSE = 0.01
"""Sizes that differ by less are not told apart."""
AIM = 0.97
"""Share of the limit aimed at: a bound that comes out a little higher than predicted still passes."""
LEAST_LOSS = 1e-6
GRID = 4096


def next_size(
    frontier: Sequence[PlannedPoint], measured: Sequence[tuple[int, float, bool]], limit: float
) -> int | None:
    """Bytes to plan for next, or None when the search has ended.

    `frontier` is a plan's; `measured` holds (bytes, the loss's worse end, whether it passed) of every round so far;
    `limit` is the largest loss, in the unit of the worse ends. It has ended when what passed is close to what failed,
    or to what the curve asks for, or to the smallest or largest size that a plan can have.
    """
    ends = frontier[0].size_bytes, frontier[-1].size_bytes
    passed = min((size for size, _, good in measured if good), default=None)
    failed = max((size for size, _, good in measured if not good and (passed is None or size < passed)), default=None)
    if (passed is None and failed is not None and failed > (1 - CLOSE) * ends[1]) or passed == ends[0]:
        return None
    low, high = failed or ends[0], passed or ends[1]
    if passed is not None and low > (1 - CLOSE) * passed:
        return None
    grid = np.linspace(low, high, GRID)
    meets = grid[_log_losses(frontier, measured, grid) <= np.log(max(AIM * limit, LEAST_LOSS))]
    wanted = float(meets[0]) if len(meets) else high
    if passed is not None and wanted > (1 - CLOSE) * passed:
        return None
    if failed is not None and wanted < (1 + CLOSE) * failed:  # the curve says what was measured to be wrong
        wanted = min((1 + CLOSE) * failed, high) if passed is None else (failed + passed) / 2
    return int(np.ceil(wanted))


def _log_losses(
    frontier: Sequence[PlannedPoint], measured: Sequence[tuple[int, float, bool]], sizes: np.ndarray
) -> np.ndarray:
    """The logarithm of the loss expected at each of `sizes`, float64 of their shape."""
    at = [point.size_bytes for point in frontier]
    curve = np.log([max(point.loss_increase, 1e-12) for point in frontier])
    known = sorted((size, np.log(max(loss, LEAST_LOSS))) for size, loss, _ in measured)
    places = [size for size, _ in known]
    factors = [loss - np.interp(size, at, curve) for size, loss in known]
    return np.interp(sizes, at, curve) + np.interp(sizes, places, factors)


def in_drops(plan: Plan, drop: float) -> tuple[Point, ...]:
    """The plan's frontier in quality given up: its loss increases times what one measurement says a unit costs."""
    factor = max(drop, 0.0) / plan.loss_increase if plan.loss_increase > 0 else 0.0
    points = [(point.size_bytes, factor * point.loss_increase) for point in plan.frontier]
    return tuple(Point(size_bytes=size_bytes, predicted_drop=predicted) for size_bytes, predicted in points)


def drop_at(frontier: Sequence[Point], size_bytes: int) -> float:
    """The frontier's drop at a size, between its points on a line in the logarithm of the drop."""
    sizes = [point.size_bytes for point in frontier]
    drops = [max(point.predicted_drop or 0.0, 1e-9) for point in frontier]
    return float(np.exp(np.interp(size_bytes, sizes, np.log(drops))))
