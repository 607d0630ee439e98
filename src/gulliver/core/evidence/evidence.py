"""Evidence: one measured number about one artifact, with its interval and how to repeat it. See docs/evidence.md.

METRICS is the one list of what can be measured; a number with another metric, unit or direction cannot be written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, ConfigDict

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.names import unknown

Direction = Literal["lower", "higher", "none"]
Beside = Literal["", "parent", "machine"]


class Metric(NamedTuple):
    """What a metric's numbers mean: their unit, which way is better, and one line of help.

    `beside`: what they say nothing without: the parent that was compared with, or the machine that was measured on.
    """

    unit: str
    direction: Direction
    help: str
    beside: Beside = ""


METRICS: Mapping[str, Metric] = {
    # quality
    "perplexity": Metric("ppl", "lower", "exp of the mean cross-entropy per token on held-out text"),
    "perplexity_ratio": Metric("ratio", "lower", "perplexity divided by the parent's on the same windows", "parent"),
    "cross_entropy": Metric("nat", "lower", "mean negative log-likelihood per predicted token or example"),
    "kl_divergence": Metric("nat", "lower", "mean KL(parent || model) of the output distributions", "parent"),
    "top1_agreement": Metric("fraction", "higher", "how often model and parent rank the same answer first", "parent"),
    "accuracy": Metric("fraction", "higher", "fraction of held-out examples answered right"),
    "accuracy_drop": Metric(
        "fraction", "lower", "the parent's accuracy minus the model's, paired by example", "parent"
    ),
    "cloze_accuracy": Metric("fraction", "higher", "fraction of held-out passages whose last word is written"),
    "cloze_accuracy_drop": Metric(
        "fraction", "lower", "the parent's cloze accuracy minus the model's, by question", "parent"
    ),
    "choice_accuracy": Metric("fraction", "higher", "fraction of passages told from three false continuations"),
    "choice_accuracy_drop": Metric(
        "fraction", "lower", "the parent's choice accuracy minus the model's, by question", "parent"
    ),
    "task_score": Metric("fraction", "higher", "mean score of the items of one of lm-eval's tasks"),
    "task_score_drop": Metric(
        "fraction", "lower", "the parent's score on the task minus the model's, by item", "parent"
    ),
    "cosine_similarity": Metric(
        "cosine", "higher", "mean cosine between the model's and the parent's embeddings", "parent"
    ),
    "quality_loss": Metric(
        "fraction", "lower", "fraction of the parent's quality given up; what --max-drop limits", "parent"
    ),
    # against the simplest baseline
    "baseline_perplexity": Metric("ppl", "none", "perplexity of the unigram distribution of the training text"),
    "baseline_accuracy": Metric("fraction", "none", "accuracy of always answering the most frequent class"),
    "baseline_cloze_accuracy": Metric("fraction", "none", "cloze accuracy of always writing their most frequent word"),
    "baseline_choice_accuracy": Metric("fraction", "none", "choice accuracy of a blind guess"),
    "baseline_cosine_similarity": Metric("cosine", "none", "mean cosine between embeddings of unrelated examples"),
    "perplexity_vs_baseline": Metric("ratio", "lower", "perplexity divided by that of the unigram baseline"),
    "accuracy_vs_baseline": Metric("fraction", "higher", "accuracy minus that of the majority class"),
    "cosine_similarity_vs_baseline": Metric(
        "cosine", "higher", "cosine to the parent minus that of unrelated examples", "parent"
    ),
    # training
    "selection_loss": Metric("nat", "none", "loss on the held-out batches by which weights were chosen; optimistic"),
    "kept_step": Metric("count", "none", "updates after which training took the weights that are kept"),
    # size and memory
    "size_bytes": Metric("bytes", "lower", "bytes of all weight files, embeddings included"),
    "size_ratio": Metric("ratio", "lower", "size_bytes divided by the parent's", "parent"),
    "bits_per_weight": Metric("bits", "lower", "8 x size_bytes divided by the number of weights"),
    "parameter_count": Metric("count", "none", "number of weights"),
    "peak_ram_bytes": Metric("bytes", "lower", "highest resident memory of a process that answers requests", "machine"),
    "load_ram_bytes": Metric(
        "bytes", "lower", "resident memory after the model is loaded, before the first request", "machine"
    ),
    "compress_peak_ram_bytes": Metric("bytes", "lower", "highest resident memory of the process that compressed it"),
    # speed, always of the machine named in the evidence
    "decode_tokens_per_s": Metric("tokens/s", "higher", "generated tokens per second, one sequence", "machine"),
    "prefill_tokens_per_s": Metric("tokens/s", "higher", "prompt tokens per second, one sequence", "machine"),
    "examples_per_s": Metric("examples/s", "higher", "examples answered per second", "machine"),
    "load_seconds": Metric("s", "lower", "time from the command to a model that can answer", "machine"),
}

AS_GOOD: Mapping[str, float] = {
    "perplexity_ratio": 1.0,
    "quality_loss": 0.0,
    **dict.fromkeys(("accuracy_drop", "cloze_accuracy_drop", "choice_accuracy_drop", "task_score_drop"), 0.0),
}
"""What a model that is as good as its parent has; a model made from it is hardly better (core/evidence/gate.py)."""

MUST_BEAT: Mapping[str, float] = {
    "perplexity_vs_baseline": 1.0,
    "accuracy_vs_baseline": 0.0,
    "cosine_similarity_vs_baseline": 0.0,
}
"""A model whose interval does not lie strictly on the better side of these values passes no gate (core/gate.py)."""


ELSEWHERE: Mapping[str, Any] = {"measured": "elsewhere"}
"""In the detail of evidence that was read from a folder: nothing shows that it was recorded in this home."""


def metric(name: str) -> Metric:
    """The row of METRICS. ConfigError naming the nearest metric when there is none."""
    if name not in METRICS:
        raise ConfigError(unknown("metric", name, METRICS))
    return METRICS[name]


def _from_json(number: object) -> object:
    """NaN and the infinities, which JSON does not have: null, "inf" and "-inf"."""
    return math.nan if number is None else float(str(number)) if number in ("inf", "-inf") else number


Number = Annotated[float, BeforeValidator(_from_json)]


@dataclass(frozen=True)
class Evidence:
    """One measured number about one artifact.

    `low` and `high` bound the 95 % interval and equal `value` for an exact count; `n` is the number of independent
    observations; `data_hash` the SHA-256 of what was measured on ("" when no data is involved); `parent_id` the
    artifact it is compared with; `command` repeats the measurement. A NaN is kept and refused by every gate.
    `artifact_id`, `parent_id`, `machine` and `command` are filled in by the step that records it.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # for the records that hold it

    metric: str
    value: Number
    low: Number
    high: Number
    unit: str
    direction: Direction
    n: int
    seed: int = 0
    data_hash: str = ""
    artifact_id: str = ""
    parent_id: str | None = None
    machine: str = ""
    command: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        row = metric(self.metric)
        if (self.unit, self.direction) != (row.unit, row.direction):
            raise ConfigError(
                f"evidence for {self.metric} has unit {self.unit!r} and direction {self.direction!r}; "
                f"METRICS says {row.unit!r} and {row.direction!r}"
            )
        if self.n < 0:
            raise ConfigError(f"evidence for {self.metric} has n = {self.n}; it counts observations, at least 0")
        slack = 1e-9 * max(1.0, abs(self.value)) if math.isfinite(self.value) else 0.0
        if self.is_number and not self.low - slack <= self.value <= self.high + slack:
            raise ConfigError(f"evidence for {self.metric}: {self.value} lies outside {self.low} … {self.high}")

    @property
    def is_number(self) -> bool:
        """False when the value or an end of its interval is NaN."""
        return not any(math.isnan(number) for number in (self.value, self.low, self.high))

    @property
    def elsewhere(self) -> bool:
        """True for evidence that was read from a folder (see `doctor --repair`); it passes no gate."""
        return ELSEWHERE.items() <= self.detail.items()

    @property
    def worse_end(self) -> float:
        """The end of the interval that a gate must judge: `high` where lower is better, `low` where higher is."""
        if self.direction == "none" or not self.is_number:
            return math.nan
        return max(self.high, self.value) if self.direction == "lower" else min(self.low, self.value)

    def filled(self, **missing: str | None) -> Evidence:
        """A copy in which those of the named fields that are empty hold the given values."""
        return replace(self, **{name: value for name, value in missing.items() if not getattr(self, name)})

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field; a NaN or infinite number becomes null, "inf" or "-inf"."""
        numbers = {name: _to_json(getattr(self, name)) for name in ("value", "low", "high")}
        return {**vars(self), **numbers, "detail": dict(self.detail)}


def measured(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    n: int = 1,
    seed: int = 0,
    data_hash: str = "",
    detail: Mapping[str, Any] | None = None,
) -> Evidence:
    """Evidence whose unit and direction come from METRICS; without `low` and `high` it is an exact count."""
    row, low, high = metric(name), value if low is None else low, value if high is None else high
    ends = float(value), float(low), float(high)
    return Evidence(name, *ends, row.unit, row.direction, n, seed, data_hash, detail=detail or {})


def paired_interval(
    differences: Sequence[float] | Iterable[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean and two-sided interval of per-window (or per-example) differences: (mean, low, high).

    Student's t with n - 1 degrees of freedom: mean ± t · s / sqrt(n), s the sample standard deviation. Pairing by
    window removes the windows' own variance, which is far larger than the effect. One difference has an infinite
    interval; a NaN makes all three NaN. DataError for no differences, ConfigError for a confidence outside (0, 1).
    "Student" (W. S. Gosset), The Probable Error of a Mean, Biometrika 6 (1908).
    """
    values = [float(value) for value in differences]
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; it must lie between 0 and 1, for example 0.95")
    if not values:
        raise DataError("no differences to make an interval from; measure at least two windows")
    count = len(values)
    mean = math.fsum(values) / count if all(map(math.isfinite, values)) else sum(values) / count
    if math.isnan(mean):
        return math.nan, math.nan, math.nan
    if count == 1 or math.isinf(mean):
        return mean, -math.inf, math.inf
    from scipy.special import stdtrit  # here, because scipy takes longer to import than the rest of core

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stdtrit(count - 1, 0.5 + confidence / 2)) * deviation / math.sqrt(count)
    return mean, mean - half, mean + half


def _to_json(number: float) -> float | str | None:
    if math.isnan(number):
        return None
    return number if math.isfinite(number) else ("inf" if number > 0 else "-inf")
