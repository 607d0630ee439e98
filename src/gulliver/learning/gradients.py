"""The gradient of one step, made of micro-batches: Σ gradients of losses / Σ trained positions.

A loss is first summed, and divided when the count of the whole step is known, so the same examples give the same step
in however many parts they are computed and however they are padded. autograd adds the parts in place; where something
must see each alone (the hook), or bfloat16 would lose digits, they are taken out and added in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gulliver.core.errors import DataError, GulliverError
from gulliver.learning.evaluation import Losses

GradientHook = Callable[[int, dict[Tensor, Tensor]], None]
"""(micro-batch, gradient of the sum of its losses by parameter): may change the gradients in place."""


class Gradients:
    """Gradients of `tensors` (any shapes) over the micro-batches of a step."""

    def __init__(self, tensors: list[Tensor], accumulate: int, hook: GradientHook | None) -> None:
        self.tensors, self.hook = tensors, hook
        narrow = accumulate > 1 and any(tensor.dtype == torch.bfloat16 for tensor in tensors)
        self.apart = hook is not None or narrow
        self.sums: dict[Tensor, Tensor] = {}
        self.total, self.positions = 0.0, 0

    def add(self, losses: Losses, step: int, index: int, checkpoint: Path | None) -> None:
        """Add the gradients of micro-batch `index` of a step, from its losses and counts [examples].

        GulliverError when a loss is not finite; it names the last good `checkpoint`.
        """
        total, positions = summed(losses, step, index, checkpoint)
        self.total, self.positions = self.total + float(total.detach()), self.positions + positions
        total.backward()
        if not self.apart:
            return
        found = self._taken()
        if self.hook is not None:
            self.hook(index, found)
        for tensor, gradient in found.items():
            if tensor in self.sums:
                self.sums[tensor].add_(gradient)
            else:
                self.sums[tensor] = gradient.float()

    def mean(self, step: int) -> float:
        """The mean loss of a trained position of the step. DataError when none is trained."""
        if self.positions == 0:
            raise nothing_trained(step)
        return self.total / self.positions

    def take(self) -> tuple[dict[Tensor, Tensor], int]:
        """All that was added, by parameter [any shape], and over how many positions; the next step begins with none."""
        found, self.sums = (self.sums if self.apart else self._taken()), {}
        positions, self.total, self.positions = self.positions, 0.0, 0
        return found, positions

    def _taken(self) -> dict[Tensor, Tensor]:
        found = {tensor: tensor.grad for tensor in self.tensors if tensor.grad is not None}
        for tensor in found:
            tensor.grad = None
        return found


def summed(losses: Losses, step: int, index: int, checkpoint: Path | None) -> tuple[Tensor, int]:
    """(differentiable scalar Σ loss · count, Σ count) of losses [examples] and counts [examples].

    An example of count 0 has no part in it. GulliverError when a loss is not finite.
    """
    values, counts = losses
    if values.shape != counts.shape:
        raise AssertionError(f"losses have the shape {tuple(values.shape)}, counts {tuple(counts.shape)}")
    total = (torch.where(counts > 0, values, 0.0) * counts).sum()
    if not math.isfinite(number := float(total.detach())):
        raise not_finite(f"the loss is {number}", step, index, checkpoint)
    return total, int(counts.sum())


def not_finite(what: str, step: int, index: int | str, checkpoint: Path | None) -> GulliverError:
    """The error of a number that is not finite at 0-based `step`, in micro-batch (or -batches) `index`."""
    good = f"the last good checkpoint is {checkpoint}" if checkpoint is not None else "there is no checkpoint yet"
    return GulliverError(f"{what} at step {step} (batch {index}); {good}. Lower the learning rate or check the data")


def nothing_trained(step: int) -> DataError:
    """The error of a step whose examples have nothing to learn from."""
    return DataError(f"no position is trained at step {step}: every example is empty or masked; check the data")
