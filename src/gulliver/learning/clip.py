"""Clipping of gradients g of parameters p: at most one of three limits.

    norm    all of g is shortened to length `limit` (On the difficulty of training RNNs, 2012, arXiv 1211.5063)
    value   each number is cut to -limit … limit
    unit    each unit's g (a row of a matrix, an output channel, a whole vector) is shortened to limit * max(|p|, 1e-3),
            so that no unit changes by more than a share of itself (AGC: High-performance large-scale image recognition
            without normalization, 2021, arXiv 2102.06171)

What is recorded is the share that was cut: of steps (0 or 1 each) for norm, of numbers for value, of units for unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gulliver.core.errors import ConfigError

LEAST_UNIT = 1e-3


@dataclass(frozen=True)
class Clipping:
    """`limit` in the gradient's unit for norm and value, a ratio for unit."""

    kind: Literal["norm", "value", "unit", "none"] = "none"
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.limit < math.inf:
            raise ConfigError(f"the limit of clipping by {self.kind} is {self.limit}; it must be a positive number")

    @torch.no_grad()
    def apply(self, gradients: Mapping[Tensor, Tensor], norm: float, scale: float) -> float:
        """Multiply gradients (by parameter, of any shapes) by `scale`, and clip; returns the share that was cut.

        `norm` is the length of all of them together, after scaling.
        """
        if self.kind == "norm":
            scale *= min(1.0, self.limit / (norm + 1e-6))
        for gradient in gradients.values():
            gradient.mul_(scale)
        if self.kind == "norm":
            return float(norm > self.limit)
        cut, whole = 0, 0
        for parameter, gradient in gradients.items():
            if self.kind == "value":
                cut, whole = cut + int((gradient.abs() > self.limit).sum()), whole + gradient.numel()
                gradient.clamp_(-self.limit, self.limit)
            elif self.kind == "unit":
                longest = self.limit * unit_norms(parameter.detach()).clamp_min(LEAST_UNIT)
                ours = unit_norms(gradient)
                gradient.mul_(torch.where(ours > longest, longest / ours, 1.0))
                cut, whole = cut + int((ours > longest).sum()), whole + ours.numel()
        return cut / max(whole, 1)


def unit_norms(tensor: Tensor) -> Tensor:
    """The length of each unit: [rows, 1, …] of a tensor [rows, …], one number for a vector; float32."""
    kept = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    return torch.linalg.vector_norm(tensor, dim=kept, keepdim=True, dtype=torch.float32)
