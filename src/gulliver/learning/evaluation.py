"""Evaluation during training: what was measured on held-out data, and what follows from it.

Which weights are best, whether to stop and how often the rate was cut are functions of the list of measurements, which
is in every checkpoint: a run that was killed decides what the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gulliver.core.errors import ConfigError
from gulliver.core.evidence.evidence import paired_interval
from gulliver.core.training import HeldOut

Losses = tuple[Tensor, Tensor]
"""(mean loss of each example, float32 [examples]; over how many trained positions it is the mean, int64 [examples])."""


@dataclass(frozen=True)
class Evaluation:
    """Every `every` steps, and after the last, `measure()` gives the losses of held-out examples.

    Training stops after `patience` measurements in a row that were not below the best; None: never. `keep` says
    whether the best weights or the last are the result.
    """

    measure: Callable[[], Losses]
    every: int
    patience: int | None = None
    keep: Literal["best", "last"] = "last"

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("patience", self.patience)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; an evaluation needs at least 1")


class NotFinite(ArithmeticError):
    """A held-out loss that is no number: it counts as nothing, and certainly not as good."""


def mean_loss(losses: Losses, step: int) -> HeldOut:
    """What one evaluation measured, of losses [examples] and counts [examples].

    The interval is that of the ratio of two sums, by its linear part: count_i (loss_i - mean) / mean count.
    NotFinite when the mean is not.
    """
    values, counts = (one.detach().double() for one in losses)
    whole = float(counts.sum())
    mean = float((values * counts).sum()) / whole if whole else math.nan
    _, low, high = paired_interval((counts * (values - mean) / counts.mean()).tolist())
    half = (high - low) / 2
    examples = int((counts > 0).sum())
    if not math.isfinite(mean):
        raise NotFinite(mean)
    return HeldOut(step=step, loss=mean, half_width=half if math.isfinite(half) else None, examples=examples)


def best(measurements: Sequence[HeldOut]) -> HeldOut | None:
    """The first of the lowest; None where nothing was measured."""
    return min(measurements, key=lambda one: one.loss, default=None)


def waited(measurements: Sequence[HeldOut]) -> int:
    """How many measurements there have been since the best."""
    found = best(measurements)
    return len(measurements) - 1 - measurements.index(found) if found else 0
