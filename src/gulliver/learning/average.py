"""Averages of the weights and buffers over the steps of a run, in float32; often better than the last ones.

    ema     a <- decay * a + (1 - decay) * p   (Polyak, 1992; Mean teachers, 2017, arXiv 1703.01780)
    mean    of all steps from the first averaged one on (SWA, 2018, arXiv 1803.05407)

Both begin with the weights of their first step. Whole numbers (counts of batches) are those of the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gulliver.core.errors import ConfigError


@dataclass(frozen=True)
class Averaging:
    """What is averaged from 0-based step `start` on; `decay` is for ema."""

    kind: Literal["ema", "mean"]
    decay: float = 0.999
    start: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"the decay of an average is {self.decay}; it must be at least 0 and below 1")


class Average:
    """`values`: the averages by name, float32 of the shape of what is averaged (whole numbers in their own type)."""

    def __init__(self, config: Averaging, live: Mapping[str, Tensor]) -> None:
        self.config, self.live = config, live
        self.values = {name: _like(tensor) for name, tensor in live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in what `live` is after the update of 0-based `step`."""
        seen = step - self.config.start
        if seen < 0:
            return
        share = 1.0 - self.config.decay if self.config.kind == "ema" else 1.0 / (seen + 1)
        for name, tensor in self.live.items():
            if seen and tensor.is_floating_point():
                self.values[name].lerp_(tensor.float(), share)
            else:
                self.values[name].copy_(tensor)

    def ready(self, step: int) -> bool:
        """Whether anything has been averaged after the update of 0-based `step`."""
        return step >= self.config.start


def _like(tensor: Tensor) -> Tensor:
    kept = tensor.detach().clone()
    return kept.float() if tensor.is_floating_point() else kept
