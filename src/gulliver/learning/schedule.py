"""How rates change over T optimizer steps, w of them warmup. At step t every group's rate is multiplied by

    (t + 1) / w                                     for t < w, but for one-cycle and range
    cosine     (1 + cos(pi (t - w) / (T - w))) / 2  SGDR, 2016, arXiv 1608.03983
    wsd        1, and over the last D steps (T - t) / D (warmup, stable, decay: MiniCPM, 2024, arXiv 2404.06395)
    one-cycle  from 1/25 up to 1 over w steps and down to 1/250000 at the end, along cosines, while the momentum goes
               from 0.95 to 0.85 and back (Super-convergence, 2017, arXiv 1708.07120)
    plateau    1, multiplied by `shrink` whenever `patience` evaluations in a row brought nothing better
    constant   1
    range      from 1e-6 to 1, by the same ratio at every step: a test of rates (learning/range_test.py)

so that the first update is not wasted on a rate of zero, and the last one still moves. All of it is a function of the
step and of the evaluations so far, so that a schedule has nothing to save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gulliver.core.errors import ConfigError

ScheduleName = Literal["cosine", "wsd", "one-cycle", "plateau", "constant", "range"]
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 250_000
HIGH_MOMENTUM, LOW_MOMENTUM = 0.95, 0.85
RANGE_START = 1e-6


@dataclass(frozen=True)
class Schedule:
    """`warmup_steps` (0 or more), `decay_steps` of wsd, `patience` evaluations and `shrink` of plateau."""

    warmup_steps: int = 0
    name: ScheduleName = "cosine"
    decay_steps: int = 0
    patience: int = 2
    shrink: float = 0.5

    def __post_init__(self) -> None:
        if self.name == "plateau" and not (self.patience >= 1 and 0 < self.shrink < 1):
            told = f"patience is {self.patience} and shrink {self.shrink}"
            raise ConfigError(f"{told}; a plateau needs a patience of at least 1 and a shrink between 0 and 1")

    def factor(self, step: int, steps: int, evaluations: Sequence[float] = ()) -> float:
        """What every rate is multiplied by at 0-based `step` of `steps`, after held-out losses of `evaluations`."""
        assert 0 <= step < steps, f"step {step} is not within {steps} steps"
        if self.name == "range":
            return RANGE_START ** (1 - step / max(steps - 1, 1))
        if self.name == "one-cycle":
            rising = self._rising(step, steps)
            low = ONE_CYCLE_START if step < self.warmup_steps else ONE_CYCLE_END
            return low + (1 - low) * rising
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)))
        if self.name == "wsd":
            return min(1.0, (steps - step) / max(self.decay_steps, 1))
        return self.shrink ** plateaus(evaluations, self.patience) if self.name == "plateau" else 1.0

    def momentum(self, step: int, steps: int) -> float | None:
        """The momentum of every group at 0-based `step`; None where it stays what it is."""
        if self.name != "one-cycle":
            return None
        return HIGH_MOMENTUM - (HIGH_MOMENTUM - LOW_MOMENTUM) * self._rising(step, steps)

    def _rising(self, step: int, steps: int) -> float:
        """How far one cycle is up, 0 to 1."""
        if step < self.warmup_steps:
            return 0.5 - 0.5 * math.cos(math.pi * step / self.warmup_steps)
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup_steps) / max(steps - 1 - self.warmup_steps, 1))


def plateaus(losses: Sequence[float], patience: int) -> int:
    """How often `patience` losses in a row were not below the best before them."""
    best, waiting, found = math.inf, 0, 0
    for loss in losses:
        waiting = 0 if loss < best else waiting + 1
        best = min(best, loss)
        if waiting == patience:
            waiting, found = 0, found + 1
    return found
