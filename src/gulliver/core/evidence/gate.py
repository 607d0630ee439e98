"""Gates: rules over evidence. A gate that finds no evidence refuses, and so does one whose evidence is only hopeful.

The bad end of the interval must meet the threshold: with "lower is better" that is `high <= at_most`, with "higher is
better" `low >= at_least`. Evidence belongs to one content id; a changed artifact has another, so its evidence expired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gulliver.core.errors import ConfigError, DataError, GateRefused
from gulliver.core.evidence.evidence import METRICS, MUST_BEAT, Evidence, metric

Outcome = Literal["PASS", "FAIL", "NO_DATA"]
OUTCOMES = get_args(Outcome)


@dataclass(frozen=True)
class Gate:
    """One rule: `metric` at most, or at least, a threshold in the metric's unit.

    ConfigError for an unknown metric, for no threshold or two, for one that is not a finite number, and for one
    against the metric's direction (`at_least` on something that is better when lower can never protect anybody).
    """

    metric: str
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        row = metric(self.metric)
        given = [name for name in ("at_most", "at_least") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"the gate on {self.metric} needs exactly one of at_most and at_least; it has {given or 'none'}"
            )
        threshold = getattr(self, given[0])
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
            raise ConfigError(f"the gate on {self.metric}: {given[0]} is {threshold!r}; it must be a finite number")
        right = {"lower": "at_most", "higher": "at_least"}.get(row.direction)
        if right is None:
            gated = ", ".join(name for name in METRICS if METRICS[name].direction != "none")
            raise ConfigError(f"{self.metric} has no better direction and cannot be gated; these can: {gated}")
        if given[0] != right:
            raise ConfigError(
                f"the gate on {self.metric}: {row.direction} is better, so write {right} instead of {given[0]}"
            )

    @property
    def rule(self) -> str:
        """The gate as a person writes it: "perplexity_ratio <= 1.05"."""
        if self.at_most is not None:
            return f"{self.metric} <= {self.at_most:g}"
        return f"{self.metric} >= {self.at_least:g}"

    def judge(self, evidence: Sequence[Evidence], artifact_id: str) -> Verdict:
        """The verdict on one artifact, from evidence in the order in which it was recorded.

        Only evidence about `artifact_id` counts. On each data set the newest measurement counts; with several data
        sets the worst of them decides. A model that does not beat its simplest baseline fails every gate.
        """
        own = [item for item in evidence if item.artifact_id == artifact_id]
        newest = {item.data_hash: item for item in own if item.metric == self.metric}
        if not newest:
            return Verdict(self, "NO_DATA", None, self._why_no_data(evidence, artifact_id))
        judged = [(self._refusal(item), item) for item in newest.values()]
        for outcome in ("NO_DATA", "FAIL"):
            refused = [(reason, item) for (found, reason), item in judged if found == outcome]
            if refused:
                reason, item = min(refused, key=lambda pair: self._margin(pair[1]))
                return Verdict(self, outcome, item, reason)
        below = _below_baseline(own)
        if below:
            return Verdict(self, "FAIL", below, f"it does not beat its simplest baseline: {_describe(below)}")
        (_, reason), item = min(judged, key=lambda pair: self._margin(pair[1]))
        return Verdict(self, "PASS", item, reason)

    def _refusal(self, item: Evidence) -> tuple[Outcome, str]:
        if item.n == 0:
            return "NO_DATA", f"{self.metric} was measured on 0 examples"
        if not item.is_number:
            return "FAIL", f"{self.metric} is not a number; the measurement itself failed"
        threshold = self.at_most if self.at_most is not None else self.at_least
        verb = "meets" if self._margin(item) >= 0 else "misses"
        outcome: Outcome = "PASS" if verb == "meets" else "FAIL"
        return outcome, f"{_describe(item)}; its bad end {item.bad_end:g} {verb} {threshold:g}"

    def _margin(self, item: Evidence) -> float:
        """How far the bad end lies on the good side of the threshold; negative means refused, NaN is the worst."""
        if not item.is_number:
            return -math.inf
        if self.at_most is not None:
            return self.at_most - item.bad_end
        assert self.at_least is not None
        return item.bad_end - self.at_least

    def _why_no_data(self, evidence: Sequence[Evidence], artifact_id: str) -> str:
        if any(item.metric == self.metric for item in evidence):
            return f"{self.metric} was measured on other artifacts only, which does not count for {artifact_id[:12]}"
        return f"{self.metric} was not measured; run `gulliver audit {artifact_id[:12]}`"


@dataclass(frozen=True)
class Verdict:
    """What a gate says about one artifact, the evidence it rests on, and why."""

    gate: Gate
    outcome: Outcome
    evidence: Evidence | None
    reason: str

    @property
    def passed(self) -> bool:
        """True for PASS only; NO_DATA refuses."""
        return self.outcome == "PASS"

    def to_json(self) -> dict[str, Any]:
        """A JSON object: the rule's parts, outcome, reason, and the evidence or null."""
        return {
            "metric": self.gate.metric,
            "at_most": self.gate.at_most,
            "at_least": self.gate.at_least,
            "outcome": self.outcome,
            "reason": self.reason,
            "evidence": self.evidence.to_json() if self.evidence else None,
        }

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Verdict:
        """A verdict from an untrusted JSON object. GulliverError for missing, unknown or wrongly typed parts."""
        keys = {"metric", "at_most", "at_least", "outcome", "reason", "evidence"}
        if set(row) != keys:
            raise DataError(f"a verdict must hold {', '.join(sorted(keys))}, not {', '.join(sorted(row))[:200]}")
        if row["outcome"] not in OUTCOMES:
            raise DataError(f"outcome is {row['outcome']!r}; it must be one of {', '.join(OUTCOMES)}")
        if not isinstance(row["metric"], str) or not isinstance(row["reason"], str):
            raise DataError("a verdict's metric and reason must be text")
        found = row["evidence"]
        if not isinstance(found, Mapping | None):
            raise DataError(f"a verdict's evidence must be an object or null, not {type(found).__name__}")
        gate = Gate(row["metric"], row["at_most"], row["at_least"])
        return Verdict(gate, row["outcome"], None if found is None else Evidence.from_json(found), row["reason"])


def require(verdicts: Sequence[Verdict]) -> None:
    """Return if every verdict is PASS. GateRefused lists those that are not; no verdict at all is refused too."""
    if not verdicts:
        raise GateRefused("no gate was judged, so nothing is proven; name at least one gate")
    refused = [verdict for verdict in verdicts if not verdict.passed]
    if refused:
        lines = [f"  {verdict.outcome}  {verdict.gate.rule}: {verdict.reason}" for verdict in refused]
        raise GateRefused("\n".join([f"{len(refused)} of {len(verdicts)} gates refused", *lines]))


def _below_baseline(own: Sequence[Evidence]) -> Evidence | None:
    """The newest evidence, per data set, that the model is no better than its baseline."""
    newest = {(item.metric, item.data_hash): item for item in own if item.metric in MUST_BEAT}
    for item in newest.values():
        limit = MUST_BEAT[item.metric]
        better = item.bad_end < limit if item.direction == "lower" else item.bad_end > limit
        if not (item.is_number and better):
            return item
    return None


def _describe(item: Evidence) -> str:
    return f"{item.metric} is {item.value:g} ({item.low:g} … {item.high:g}, n = {item.n})"
