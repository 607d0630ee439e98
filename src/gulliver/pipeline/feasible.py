"""What would have been feasible where a budget is not: a larger size, or the figure of a limit that would do.

A point is called feasible only where every limit that was set is met: those that a larger size does not change by what
was measured, the quality given up by the upper bound that is predicted from what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gulliver.core.evidence.gate import Budget, Verdict
from gulliver.core.records import Point

MARGIN = 1.3
"""Predictions hold within about 30 % (docs/log.md): what is called feasible is within the limit by so much."""


def nearest_larger(
    budget: Budget, verdicts: Sequence[Verdict], rounds: Sequence[Point], frontier: Sequence[Point]
) -> Point | None:
    """The smallest size that is predicted to meet every limit but the size; None where there is no such size.

    A round that missed only its size is such a point itself. A larger model answers more slowly, in proportion.
    """
    missed = {verdict.metric: verdict for verdict in verdicts if not verdict.passed}
    judged_itself = all(one.evidence is not None and one.evidence.metric == one.metric for one in missed.values())
    if not rounds or not judged_itself or set(missed) - {"size_bytes", "quality_loss"}:
        return None
    last = rounds[-1]
    if set(missed) == {"size_bytes"}:
        return last
    if not missed:  # the file of another engine is too large, by bytes that no size predicts
        return None
    lost = missed["quality_loss"].evidence
    if budget.max_drop is None or lost is None or not lost.is_number or not lost.value > 0:
        return None
    slower = next((one.evidence for one in verdicts if one.metric == budget.speed_metric and one.evidence), None)
    for point in frontier:
        bound = MARGIN * (point.predicted_drop or 0.0) * lost.worse_end / lost.value
        speed = slower.worse_end * last.size_bytes / point.size_bytes if slower else math.inf
        if point.size_bytes > last.size_bytes and bound <= budget.max_drop and speed >= (budget.min_tokens_per_s or 0):
            return point
    return None


def figures_that_would_do(verdicts: Sequence[Verdict]) -> str:
    """The limits that the measured model would meet, as options: "--max-drop 6.2%"; "" where one was not measured."""
    found = []
    for verdict in verdicts:
        item = verdict.evidence
        if verdict.passed:
            continue
        if item is None or item.metric != verdict.metric or not math.isfinite(item.worse_end):
            return ""
        if item.metric == "quality_loss" and not 0 <= item.worse_end <= 1:
            return ""  # no budget allows that
        found.append(_option(verdict, item.worse_end))
    return " ".join(found)


def _option(verdict: Verdict, worse_end: float) -> str:
    if verdict.metric == "quality_loss":
        return f"--max-drop {_up(100 * worse_end, 2):g}%"
    if verdict.metric == "size_bytes":
        return f"--size {math.ceil(worse_end)}B"
    if verdict.metric == "compress_peak_ram_bytes":
        return f"--ram {math.ceil(worse_end / 1e6)}MB"
    return f"--speed {-_up(-worse_end, 3):g}"


def _up(number: float, figures: int) -> float:
    """The next larger number with so many figures."""
    if number == 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(abs(number))) - figures + 1)
    return math.ceil(number / step) * step
