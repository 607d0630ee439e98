"""The learning rate as a pure function of the step: linear warmup, then cosine decay (SGDR, 2016, arXiv 1608.03983).

With T steps, w of them warmup, and f the final fraction, the factor on every group's learning rate at step t is

    (t + 1) / w                                               for t < w
    f + (1 - f) * (1 + cos(pi * (t - w) / (T - w))) / 2        after that

so that the first update is not wasted on a rate of zero, and the last one still moves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gulliver.core.errors import ConfigError

SHAPES = ("cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """`warmup_steps` of linear warmup, then `shape`; a cosine ends at `final_fraction` of the peak."""

    warmup_steps: int = 0
    shape: str = "cosine"
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if self.shape not in SHAPES:
            raise ConfigError(f"schedule shape is {self.shape!r}; choose one of {', '.join(SHAPES)}")
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ConfigError(f"final_fraction is {self.final_fraction}; it must be between 0 and 1")

    def factor(self, step: int, steps: int) -> float:
        """What every learning rate is multiplied by at 0-based `step` of `steps`."""
        assert 0 <= step < steps, f"step {step} is not within {steps} steps"
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
        return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))
