"""Evidence about an image classifier: from its logits and its parent's on the same held-out images.

Proportions and their differences on the same images have the intervals of core/evidence/intervals.py, mean divergences
Student's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gulliver.core.evidence.evidence import Evidence, measured, paired_interval
from gulliver.core.evidence.intervals import matched_interval, wilson_interval


def divergences(logits: Tensor, parent_logits: Tensor) -> Tensor:
    """KL(parent || model) in nats, float32 [n], of logits [n, classes]."""
    log, parent_log = logits.float().log_softmax(-1), parent_logits.float().log_softmax(-1)
    return (parent_log.exp() * (parent_log - log)).sum(-1)


def evidence(
    logits: Tensor, labels: Tensor, majority: int, parent_logits: Tensor | None, data_hash: str
) -> list[Evidence]:
    """All metrics of logits [n, classes] on labels [n]; `majority` is the train split's most frequent label."""
    n = len(labels)
    right = (logits.argmax(-1) == labels).tolist()
    guessed = (labels == majority).tolist()

    def row(name: str, interval: tuple[float, float, float]) -> Evidence:
        return measured(name, *interval, n=n, data_hash=data_hash)

    cross_entropy = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    rows = [
        row("accuracy", wilson_interval(sum(right), n)),
        row("cross_entropy", _mean(cross_entropy)),
        row("baseline_accuracy", wilson_interval(sum(guessed), n)),
        row("accuracy_vs_baseline", matched_interval(right, guessed)),
    ]
    if parent_logits is None:
        return rows
    best = parent_logits.argmax(-1)
    drop = matched_interval((best == labels).tolist(), right)
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
