"""Weights of bfloat16 that lose nothing on average: two ways to put a float32 update into 8 bits of mantissa.

An update smaller than half the distance to the next bfloat16 number vanishes when it is rounded to nearest, and a
network stops learning. (Revisiting BFloat16 training, 2020, arXiv 2010.06192)

    stochastic    the value is rounded up with the probability of its distance from the lower neighbour, so the mean is
                  right: 16 random bits are added to the 16 that are cut off
    compensated   what was cut off is kept in a second bfloat16 number and added the next time (Kahan's sum)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["stochastic", "compensated"]
REST = "rest"
"""Name of the state that holds what was cut off."""


def widened(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The weight, bfloat16 of any shape, as the float32 number that it stands for."""
    value = weight.detach().float()
    return value.add_(state[REST]) if REST in state else value


def store_rounded(value: Tensor, weight: Tensor, state: dict[str, Tensor], rounding: Rounding) -> None:
    """Put `value`, float32 of any shape, into the bfloat16 `weight` of the same shape."""
    if rounding == "stochastic":
        weight.copy_(stochastic(value))
        return
    weight.copy_(value)
    state.setdefault(REST, torch.empty_like(weight)).copy_(value.sub_(weight))


def stochastic(value: Tensor) -> Tensor:
    """bfloat16 numbers of any shape next to the float32 ones in `value`, whose mean over many draws is `value`."""
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device)
    bits = value.contiguous().view(torch.int32) + noise
    return (bits & -(1 << 16)).view(torch.float32).bfloat16()
