"""Evidence about an image classifier: from its logits and its parent's on the same held-out images.

Proportions have Wilson's interval (1927): centre (p + z²/2n) / (1 + z²/n), half-width
z · sqrt(p(1 - p)/n + z²/4n²) / (1 + z²/n). Differences of proportions on the same images have Agresti and Min's (2005,
"Simple improved confidence intervals for comparing matched proportions"): with b images that only the parent gets
right and c that only the model does, add 1/2 to each cell of the 2 x 2 table and take Wald's interval. Unlike
Student's it does not shrink to a point when the two agree on every image. Mean divergences have Student's interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gulliver.core.evidence.evidence import Evidence, measured, paired_interval

Z = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson_interval(hits: int, n: int) -> tuple[float, float, float]:
    """(share, low, high) of `hits` among `n` >= 1."""
    share = hits / n
    scale = 1.0 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / scale
    half = Z * math.sqrt(share * (1.0 - share) / n + Z * Z / (4 * n * n)) / scale
    return share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def matched_interval(
    first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray
) -> tuple[float, float, float]:
    """(difference, low, high) of the shares of True in `first` minus `second`, each [n], paired by position, n >= 1."""
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    assert one.shape == two.shape and one.ndim == 1 and len(one), (one.shape, two.shape)
    n, only_one, only_two = len(one), int((one & ~two).sum()), int((two & ~one).sum())
    value = (only_one - only_two) / n
    centre = (only_one - only_two) / (n + 2)
    half = Z * math.sqrt(only_one + only_two + 1 - (only_one - only_two) ** 2 / (n + 2)) / (n + 2)
    return value, min(max(-1.0, centre - half), value), max(min(1.0, centre + half), value)


def divergences(logits: Tensor, parent_logits: Tensor) -> Tensor:
    """KL(parent || model) in nats, float32 [n], of logits [n, classes]."""
    log, parent_log = logits.float().log_softmax(-1), parent_logits.float().log_softmax(-1)
    return (parent_log.exp() * (parent_log - log)).sum(-1)


def evidence(
    logits: Tensor, labels: Tensor, majority: int, parent_logits: Tensor | None, data_hash: str
) -> list[Evidence]:
    """All metrics of logits [n, classes] on labels [n]; `majority` is the train split's most frequent label."""
    n = len(labels)
    right = (logits.argmax(-1) == labels).numpy()
    guessed = (labels == majority).numpy()

    def row(name: str, interval: tuple[float, float, float]) -> Evidence:
        return measured(name, *interval, n=n, data_hash=data_hash)

    cross_entropy = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    rows = [
        row("accuracy", wilson_interval(int(right.sum()), n)),
        row("cross_entropy", _mean(cross_entropy)),
        row("baseline_accuracy", wilson_interval(int(guessed.sum()), n)),
        row("accuracy_vs_baseline", matched_interval(right, guessed)),
    ]
    if parent_logits is None:
        return rows
    best = parent_logits.argmax(-1)
    drop = matched_interval((best == labels).numpy(), right)
    same = int((best == logits.argmax(-1)).sum())
    return [
        *rows,
        row("accuracy_drop", drop),
        row("quality_loss", drop),
        row("top1_agreement", wilson_interval(same, n)),
        row("kl_divergence", _mean(divergences(logits, parent_logits))),
    ]


def _mean(values: Tensor) -> tuple[float, float, float]:
    """Mean and Student's interval of numbers that cannot be negative."""
    value, low, high = paired_interval(values.tolist())
    return value, max(0.0, low) if not math.isnan(low) else low, high
