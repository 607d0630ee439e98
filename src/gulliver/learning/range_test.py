"""A test of learning rates: one short run whose rate grows by the same ratio at every step, from far too small to far

too large. The loss is smoothed by an exponential average corrected for its start; the suggestion is a tenth of the rate
at its lowest point, where it still falls fast. (Cyclical learning rates for training neural networks, 2015, arXiv
1506.01186)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gulliver.core.errors import DataError, GulliverError
from gulliver.core.training import RateTest
from gulliver.learning.evaluation import Losses
from gulliver.learning.loop import LoopConfig, run_loop
from gulliver.learning.schedule import Schedule

STEPS = 100
TOP_RATE = 10.0
SMOOTH = 0.9
BACK = 10.0
"""How far below the rate of the lowest loss the suggestion lies."""


def run_range_test(
    groups: Callable[[float], list[dict[str, Any]]], loss: Callable[[int], Losses], config: LoopConfig, progress: Any
) -> RateTest:
    """Train for at most STEPS steps at rates up to TOP_RATE; what is trained is spoiled by it.

    `groups(rate)` are the parameters' groups at a peak rate; `loss` as in `run_loop`, losses and counts [examples].
    DataError when too few steps had a finite loss to suggest anything.
    """
    schedule = Schedule(name="range")
    dials = {"steps": STEPS, "schedule": schedule, "averaging": None, "evaluation": None}
    config = replace(config, **dials, optimizer=replace(config.optimizer, learning_rate=TOP_RATE))
    sums: dict[int, list[float]] = {}

    def noted(index: int, losses: Losses) -> Losses:
        values, counts = losses
        total = sums.setdefault(index // config.accumulate, [0.0, 0.0])
        total[0] += float((values.detach() * counts).sum())
        total[1] += float(counts.sum())
        return losses

    end = STEPS
    try:
        run_loop(
            parameters=groups(TOP_RATE),
            loss=lambda index: noted(index, loss(index)),
            config=config,
            progress=progress,
            stage="rates",
        )
    except DataError:
        raise
    except GulliverError:  # the rate became too large, which is what the test is for
        end = max(sums)
    losses = [total / count for total, count in list(sums.values())[:end]]
    rates = [TOP_RATE * schedule.factor(step, STEPS) for step in range(len(losses))]
    return RateTest(rates=tuple(rates), losses=tuple(losses), suggested=suggestion(rates, losses))


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the rate at which the smoothed loss is lowest, in two figures. DataError for fewer than ten losses."""
    if len(losses) < 10:
        raise DataError(f"the loss was finite for {len(losses)} steps of the test of rates; give a learning_rate")
    mean, weight, smoothed = 0.0, 1.0, []
    for loss in losses:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * loss, weight * SMOOTH
        smoothed.append(mean / (1 - weight))
    lowest = min(range(5, len(smoothed)), key=smoothed.__getitem__)
    return float(f"{rates[lowest] / BACK:.2g}")
