"""Gates, rules over evidence, and the budget, which is a set of them.

A gate that finds no evidence refuses, and so does one whose evidence is only hopeful: the worse end of the interval
must meet the limit. That is the upper bound, `high <= at_most`, where lower is better, and the lower bound,
`low >= at_least`, where higher is. Evidence belongs to one content id; a changed artifact has another, so its evidence
expired. A comparison belongs to one parent, and a time to one machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import ConfigDict

from gulliver.core.errors import ConfigError, GateRefused
from gulliver.core.evidence.evidence import AS_GOOD, METRICS, MUST_BEAT, Evidence, metric

Outcome = Literal["PASS", "FAIL", "NO_DATA"]
_WORST_FIRST: tuple[Outcome, ...] = ("NO_DATA", "FAIL", "PASS")
TOO_GOOD, NEVER_SO_GOOD = 0.01, 0.1
"""A model made from another is better than it by chance or by little. Beyond the first share the comparison is doubted

(a network that is too sure of itself may gain by rounding), beyond the second it is refused.
"""


@dataclass(frozen=True)
class Meant:
    """What evidence must have been measured against and on to count: a comparison against `parent_id` (None: against

    nothing, so that none counts), a time or memory on `machine`, by `threads` and with or without the `native` backend
    where the evidence says which.
    """

    parent_id: str | None = None
    machine: str = ""
    threads: int | None = None
    native: bool | None = None

    def missed_by(self, item: Evidence) -> str:
        """What the evidence was measured against or on instead; "" where it counts."""
        beside = METRICS[item.metric].beside
        if beside == "parent" and (item.parent_id is None or item.parent_id != self.parent_id):
            return f"against {(item.parent_id or 'nothing')[:12]}; the parent is {(self.parent_id or 'not known')[:12]}"
        if beside != "machine":
            return ""
        if item.machine != self.machine:
            return f"on {item.machine or 'a machine without a name'}; this is {self.machine or 'not known'}"
        threads, native = item.detail.get("threads"), item.detail.get("native")
        if threads is not None and self.threads is not None and threads != self.threads:
            return f"by {threads} threads; {self.threads} are asked about"
        if native is not None and self.native is not None and native != self.native:
            return f"{'with' if native else 'without'} the native backend, which is {'' if self.native else 'not '}here"
        return ""


@dataclass(frozen=True)
class Gate:
    """One rule: `metric` at most, or at least, a threshold in the metric's unit.

    ConfigError for an unknown metric, for no threshold or two, for one that is not a finite number, and for one
    against the metric's direction (`at_least` on something that is better when lower would refuse the good).
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # for the records that hold it

    metric: str
    at_most: int | float | None = None
    at_least: int | float | None = None

    def __post_init__(self) -> None:
        row = metric(self.metric)
        given = [name for name in ("at_most", "at_least") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"the gate on {self.metric} needs exactly one of at_most and at_least; it has {given or 'none'}"
            )
        threshold = getattr(self, given[0])
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not abs(threshold) < 1e300:
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
    def limit(self) -> Literal["at most", "at least"]:
        """Which side of the threshold passes."""
        return "at least" if self.at_most is None else "at most"

    @property
    def threshold(self) -> float:
        """The limit in the metric's unit."""
        given = self.at_least if self.at_most is None else self.at_most
        assert given is not None
        return given

    @property
    def rule(self) -> str:
        """The gate as a person writes it: "perplexity_ratio <= 1.05"."""
        return f"{self.metric} {'>=' if self.at_most is None else '<='} {self.threshold:g}"

    def judge(self, evidence: Sequence[Evidence], artifact_id: str, meant: Meant | None = None) -> Verdict:
        """The verdict on one artifact, from evidence in the order in which it was recorded.

        Only evidence about `artifact_id` counts, and of it what was measured as `meant`; without that against any
        parent but itself and on any machine. The newest measurement on each data set (against each parent, on each
        machine) counts, and the worst of them decides. A model that does not beat its simplest baseline fails every
        gate.
        """
        own = [
            item for item in evidence if item.artifact_id == artifact_id and not item.elsewhere and _counts(item, meant)
        ]
        newest = {_measured_as(item): item for item in own if item.metric == self.metric}
        if not newest:
            return self._verdict("NO_DATA", self._why_no_data(evidence, artifact_id, meant))
        judged = [(self._refusal(item), item) for item in newest.values()]
        (outcome, reason), item = min(judged, key=lambda pair: (_WORST_FIRST.index(pair[0][0]), self._margin(pair[1])))
        below = _below_baseline(own) if outcome == "PASS" else None
        if below is not None:
            return self._verdict("FAIL", f"it does not beat its simplest baseline: {_describe(below)}", below)
        return self._verdict(outcome, reason, item)

    def _refusal(self, item: Evidence) -> tuple[Outcome, str]:
        if item.n == 0:
            return "NO_DATA", f"{self.metric} was measured on 0 examples"
        if not item.is_number:
            return "FAIL", f"{self.metric} is not a number; the measurement itself failed"
        if too_good(item, NEVER_SO_GOOD):
            return "FAIL", suspicion(item)
        met, bound = self._margin(item) >= 0, "lower" if self.at_most is None else "upper"
        verb = "meets" if met else "misses"
        reason = f"{_describe(item)}; its {bound} bound {item.worse_end:g} {verb} {self.threshold:g}"
        return "PASS" if met else "FAIL", reason

    def _margin(self, item: Evidence) -> float:
        """How far the worse end lies on the good side of the threshold; negative means refused, NaN is the worst."""
        if not item.is_number:
            return -math.inf
        margin = self.threshold - item.worse_end
        return margin if self.at_least is None else -margin

    def _why_no_data(self, evidence: Sequence[Evidence], artifact_id: str, meant: Meant | None) -> str:
        remedy = f"run `gulliver audit {artifact_id[:12]}`"
        found = [item for item in evidence if item.metric == self.metric]
        own = [item for item in found if item.artifact_id == artifact_id]
        if own and own[-1].elsewhere:
            return f"{self.metric} was measured elsewhere, which passes no gate; {remedy}"
        if own:
            missed = meant.missed_by(own[-1]) if meant else "against itself"
            return f"{self.metric} was measured {missed}. Measure it again: `gulliver audit {artifact_id[:12]}`"
        if found:
            return f"{self.metric} was measured on other artifacts only, which does not count for {artifact_id[:12]}"
        return f"{self.metric} was not measured; {remedy}"

    def _verdict(self, outcome: Outcome, reason: str, evidence: Evidence | None = None) -> Verdict:
        return Verdict(self.metric, self.at_most, self.at_least, outcome=outcome, reason=reason, evidence=evidence)


@dataclass(frozen=True, kw_only=True)
class Verdict(Gate):
    """A gate as judged on one artifact: the outcome, why, and the evidence it rests on."""

    outcome: Outcome
    reason: str
    evidence: Evidence | None

    @property
    def passed(self) -> bool:
        """True for PASS only; NO_DATA refuses."""
        return self.outcome == "PASS"

    def to_json(self) -> dict[str, Any]:
        """A JSON object: the rule's parts, outcome, reason, and the evidence or null."""
        return {**vars(self), "evidence": self.evidence.to_json() if self.evidence else None}


@dataclass(frozen=True)
class Budget:
    """What the fitted model must meet. `max_drop` is the largest quality_loss, a fraction (0.05 is 5 %).

    `min_tokens_per_s` is in the unit of `speed_metric`, the family's own: tokens or examples per second. Without
    `size_bytes` the smallest model within `max_drop` is wanted.
    """

    size_bytes: int | None = None
    max_ram_bytes: int | None = None
    min_tokens_per_s: float | None = None
    max_drop: float | None = None
    speed_metric: str = ""

    def __post_init__(self) -> None:
        for name in ("size_bytes", "max_ram_bytes", "min_tokens_per_s"):
            limit = getattr(self, name)
            if limit is not None and (isinstance(limit, bool) or not 0 < limit < math.inf):
                raise ConfigError(f"the budget's {name} is {limit}; it must be a finite number above 0")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            told = "a fraction from 0 to 1, for example 0.05 or 5%"
            raise ConfigError(f"the budget's max_drop is {self.max_drop:g}; it must be {told}")
        if self.size_bytes is None and self.max_drop is None:
            raise ConfigError("a budget needs a size or a largest drop: --size 64MB, --max-drop 2%, or both")

    def gates(self) -> list[Gate]:
        """The gates that a model within this budget passes, size first. ConfigError for a speed of no metric."""
        gates = [] if self.size_bytes is None else [Gate("size_bytes", at_most=self.size_bytes)]
        if self.max_ram_bytes is not None:
            gates.append(Gate("compress_peak_ram_bytes", at_most=self.max_ram_bytes))
        if self.min_tokens_per_s is not None:
            if not self.speed_metric:
                raise ConfigError("the budget's min_tokens_per_s needs speed_metric, for example decode_tokens_per_s")
            gates.append(Gate(self.speed_metric, at_least=self.min_tokens_per_s))
        if self.max_drop is not None:
            gates.append(Gate("quality_loss", at_most=self.max_drop))
        return gates

    @property
    def only_size(self) -> bool:
        """Whether nothing but the size is limited."""
        return [gate.metric for gate in self.gates()] == ["size_bytes"]

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the four limits; null where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "speed_metric"}


def require(verdicts: Sequence[Verdict]) -> None:
    """Return if every verdict is PASS. GateRefused lists those that are not; no verdict at all is refused too."""
    if not verdicts:
        raise GateRefused("no gate was judged, so nothing is proven; name at least one gate")
    refused = [verdict for verdict in verdicts if not verdict.passed]
    if refused:
        lines = [f"  {verdict.outcome}  {verdict.rule}: {verdict.reason}" for verdict in refused]
        raise GateRefused("\n".join([f"{len(refused)} of {len(verdicts)} gates refused", *lines]))


def below_baseline(evidence: Sequence[Evidence], artifact_id: str) -> str | None:
    """What was measured where an artifact does not beat its simplest baseline; None where it does, or nothing tells."""
    below = _below_baseline([item for item in evidence if item.artifact_id == artifact_id])
    return None if below is None else _describe(below)


def _below_baseline(own: Sequence[Evidence]) -> Evidence | None:
    """The newest evidence, per data set, that the model is no better than its baseline."""
    newest = {_measured_as(item): item for item in own if item.metric in MUST_BEAT}
    for item in newest.values():
        limit = MUST_BEAT[item.metric]
        better = item.worse_end < limit if item.direction == "lower" else item.worse_end > limit
        if not (item.is_number and better):
            return item
    return None


def too_good(item: Evidence, share: float = TOO_GOOD) -> bool:
    """Whether a comparison says that a model is better than its parent by more than chance and `share` allow."""
    return item.metric in AS_GOOD and item.is_number and item.high < AS_GOOD[item.metric] - share


def suspicion(item: Evidence) -> str:
    """What such a comparison means."""
    return (
        f"{_describe(item)}: better than its parent by more than chance allows, as a model made from it seldom "
        "is. Look whether it was made with text of the eval part, and whether the parent is damaged or another one"
    )


def _counts(item: Evidence, meant: Meant | None) -> bool:
    """Whether evidence was measured in this home and as meant; where nothing is, against any model but itself."""
    if item.elsewhere:
        return False
    if meant is None:
        return METRICS[item.metric].beside != "parent" or item.parent_id != item.artifact_id
    return not meant.missed_by(item)


def _measured_as(item: Evidence) -> tuple[str | None, ...]:
    """What two measurements of one metric have in common when the newer replaces the older."""
    beside = {"parent": item.parent_id, "machine": item.machine, "": None}[METRICS[item.metric].beside]
    return item.metric, item.data_hash, beside


def _describe(item: Evidence) -> str:
    return f"{item.metric} is {item.value:g} ({item.low:g} … {item.high:g}, n = {item.n})"
