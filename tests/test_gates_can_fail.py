"""A check that cannot fail is a defect: for every metric that can be gated, all evidence that must be refused."""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import pytest

from gulliver.core.errors import GateRefused
from gulliver.core.evidence.evidence import AS_GOOD, METRICS, MUST_BEAT, Evidence, measured, paired_interval
from gulliver.core.evidence.gate import Budget, Gate, Meant, require, suspicion, too_good

ID, OTHER = "a" * 64, "b" * 64
GATED = [name for name, row in METRICS.items() if row.direction != "none"]


def gate_at_one(name: str) -> Gate:
    return Gate(name, at_most=1.0) if METRICS[name].direction == "lower" else Gate(name, at_least=1.0)


def good(name: str, artifact_id: str = ID) -> Evidence:
    """Evidence that passes `gate_at_one`, so that each refusal below has one cause."""
    value, width = (0.5, 0.1) if METRICS[name].direction == "lower" else (2.0, 0.1)
    if name == "perplexity_ratio":  # half of the parent's perplexity is too good to be true
        value, width = 0.996, 0.004
    return replace(measured(name, value, low=value - width, high=value + width, n=24), artifact_id=artifact_id)


def worse(name: str, by: float) -> Evidence:
    """Evidence whose value meets the threshold by far, and whose worse end misses it by `by`."""
    item = good(name)
    return replace(item, high=1.0 + by) if item.direction == "lower" else replace(item, low=1.0 - by)


@pytest.mark.parametrize("name", GATED)
def test_the_good_case_passes(name: str) -> None:
    verdict = gate_at_one(name).judge([good(name)], ID)
    assert verdict.outcome == "PASS", verdict.reason
    require([verdict])


@pytest.mark.parametrize("name", GATED)
def test_no_evidence_refuses(name: str) -> None:
    others = [good(other) for other in GATED if other != name]
    for evidence in ([], others):
        verdict = gate_at_one(name).judge(evidence, ID)
        assert verdict.outcome == "NO_DATA" and "not measured" in verdict.reason
        with pytest.raises(GateRefused):
            require([verdict])


@pytest.mark.parametrize("name", GATED)
def test_expired_evidence_refuses(name: str) -> None:
    """Evidence about another content id: the artifact was changed after it was measured."""
    for stranger in (OTHER, ID[:12], ""):
        verdict = gate_at_one(name).judge([good(name, stranger)], ID)
        assert verdict.outcome == "NO_DATA" and "other artifacts only" in verdict.reason


@pytest.mark.parametrize("name", GATED)
def test_a_worse_end_over_the_line_refuses(name: str) -> None:
    verdict = gate_at_one(name).judge([worse(name, 1e-6)], ID)
    assert verdict.outcome == "FAIL" and "misses" in verdict.reason
    with pytest.raises(GateRefused, match="1 of 1 gates refused"):
        require([verdict])


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("field", ["value", "low", "high"])
def test_nan_refuses(name: str, field: str) -> None:
    verdict = gate_at_one(name).judge([replace(good(name), **{field: math.nan})], ID)
    assert verdict.outcome == "FAIL" and "not a number" in verdict.reason


@pytest.mark.parametrize("name", GATED)
def test_an_infinite_interval_refuses(name: str) -> None:
    """One window only: nothing is known about the spread."""
    verdict = gate_at_one(name).judge([replace(good(name), low=-math.inf, high=math.inf, n=1)], ID)
    assert verdict.outcome == "FAIL"


@pytest.mark.parametrize("name", GATED)
def test_a_measurement_on_nothing_refuses(name: str) -> None:
    verdict = gate_at_one(name).judge([replace(good(name), n=0)], ID)
    assert verdict.outcome == "NO_DATA" and "0 examples" in verdict.reason


@pytest.mark.parametrize("name", GATED)
def test_one_bad_data_set_among_good_ones_refuses(name: str) -> None:
    evidence = [
        replace(good(name), data_hash="one"),
        replace(worse(name, 0.5), data_hash="two"),
        replace(good(name), data_hash="three"),
    ]
    assert gate_at_one(name).judge(evidence, ID).outcome == "FAIL"


@pytest.mark.parametrize("baseline", MUST_BEAT)
def test_a_model_no_better_than_its_baseline_passes_no_gate(baseline: str) -> None:
    limit = MUST_BEAT[baseline]
    sign = 1.0 if METRICS[baseline].direction == "lower" else -1.0
    clearly = replace(measured(baseline, limit - sign * 0.5), artifact_id=ID)
    equal = replace(measured(baseline, limit), artifact_id=ID)
    unsure = replace(measured(baseline, limit - sign * 0.1, low=limit - 0.3, high=limit + 0.3), artifact_id=ID)
    broken = replace(measured(baseline, math.nan), artifact_id=ID)
    gate, size = Gate("size_bytes", at_most=10), replace(measured("size_bytes", 9), artifact_id=ID)
    assert gate.judge([size, clearly], ID).passed
    for item in (equal, unsure, broken):
        verdict = gate.judge([size, item], ID)
        assert verdict.outcome == "FAIL" and "does not beat its simplest baseline" in verdict.reason
    assert gate.judge([size, replace(equal, artifact_id=OTHER)], ID).passed


def test_no_verdict_at_all_refuses() -> None:
    with pytest.raises(GateRefused, match="no gate was judged"):
        require([])


def test_every_gate_of_a_budget_can_fail() -> None:
    speed = {"min_tokens_per_s": 50.0, "speed_metric": "decode_tokens_per_s"}
    budget = Budget(size_bytes=100, max_ram_bytes=1000, max_drop=0.05, **speed)
    meets = {"size_bytes": 100.0, "compress_peak_ram_bytes": 1000.0, "decode_tokens_per_s": 50.0, "quality_loss": 0.05}
    misses = {name: value * 0.99 if "per_s" in name else value * 1.01 for name, value in meets.items()}
    evidence = {name: replace(measured(name, value), artifact_id=ID) for name, value in meets.items()}
    assert {gate.metric for gate in budget.gates()} == set(meets)
    require([gate.judge(list(evidence.values()), ID) for gate in budget.gates()])
    for name, value in misses.items():
        changed = {**evidence, name: replace(measured(name, value), artifact_id=ID)}
        with pytest.raises(GateRefused, match=f"FAIL  {name}"):
            require([gate.judge(list(changed.values()), ID) for gate in budget.gates()])


# ---- evidence that is talked up -------------------------------------------------------------------------------------
PARENT, HERE = "c" * 64, "a CPU, 2 cores, avx2, 8 GB"
COMPARED = [name for name in GATED if METRICS[name].beside == "parent"]
TIMED = [name for name in GATED if METRICS[name].beside == "machine"]


def test_metrics_say_what_they_say_nothing_without() -> None:
    assert {"quality_loss", "perplexity_ratio", "accuracy_drop", "cosine_similarity", "size_ratio"} <= set(COMPARED)
    assert {name for name, row in METRICS.items() if row.unit.endswith("/s") or row.unit == "s"} <= set(TIMED)
    assert set(AS_GOOD) <= set(COMPARED)


@pytest.mark.parametrize("name", COMPARED)
def test_only_the_comparison_with_the_parent_that_was_meant_counts(name: str) -> None:
    gate, meant = gate_at_one(name), Meant(parent_id=PARENT)
    right = replace(good(name), parent_id=PARENT)
    assert gate.judge([right], ID, meant).passed
    for other in (ID, OTHER, None):  # itself, another model, nothing
        verdict = gate.judge([replace(right, parent_id=other)], ID, meant)
        assert verdict.outcome == "NO_DATA" and f"the parent is {PARENT[:12]}" in verdict.reason
    assert gate.judge([right], ID, Meant()).outcome == "NO_DATA", "no parent is known"
    turned = replace(right, artifact_id=PARENT, parent_id=ID)  # the parent, compared with the model
    assert gate.judge([turned], ID, meant).outcome == "NO_DATA"
    bad = replace(worse(name, 0.5), parent_id=PARENT)
    assert gate.judge([bad, replace(right, parent_id=OTHER)], ID, meant).outcome == "FAIL", "a newer one hides nothing"


@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison_with_itself_counts_nowhere(name: str) -> None:
    """Without `Meant` too; and of several parents the worst comparison decides."""
    gate, itself = gate_at_one(name), replace(good(name), parent_id=ID)
    verdict = gate.judge([itself], ID)
    assert verdict.outcome == "NO_DATA" and "against itself" in verdict.reason
    bad = replace(worse(name, 0.5), parent_id=PARENT)
    assert gate.judge([bad, itself, replace(good(name), parent_id=OTHER)], ID).outcome == "FAIL"


@pytest.mark.parametrize("name", TIMED)
def test_a_time_counts_on_its_machine_with_its_cores_and_backend_alone(name: str) -> None:
    gate, meant = gate_at_one(name), Meant(machine=HERE, threads=2, native=True)
    right = replace(good(name), machine=HERE, detail={"threads": 2, "native": True})
    assert gate.judge([right], ID, meant).passed
    for change, told in (
        ({"machine": HERE.replace("2 cores", "16 cores")}, "16 cores"),
        ({"machine": ""}, "without a name"),
        ({"detail": {"threads": 16, "native": True}}, "by 16 threads; 2 are asked about"),
        ({"detail": {"threads": 2, "native": False}}, "without the native backend"),
    ):
        verdict = gate.judge([replace(right, **change)], ID, meant)
        assert verdict.outcome == "NO_DATA" and told in verdict.reason
        slow = replace(worse(name, 0.5), machine=HERE, detail=right.detail)
        assert gate.judge([slow, replace(right, **change)], ID, meant).outcome == "FAIL"
    slow = replace(worse(name, 0.5), machine=HERE)
    assert gate.judge([slow, replace(good(name), machine="another")], ID).outcome == "FAIL", "the worst machine decides"


@pytest.mark.parametrize("name", AS_GOOD)
def test_a_loss_that_is_too_good_refuses(name: str) -> None:
    as_good, gate = AS_GOOD[name], Gate(name, at_most=2.0)

    def found(low: float, high: float) -> Evidence:
        return replace(measured(name, (low + high) / 2 + as_good, low + as_good, high + as_good, n=24), artifact_id=ID)

    for fine in (found(-0.3, 0.2), found(-0.012, -0.008), found(0.1, 0.2)):
        assert not too_good(fine) and gate.judge([fine], ID).passed
    doubtful = found(-0.12, -0.02)
    assert too_good(doubtful) and gate.judge([doubtful], ID).passed, "it is told, and not refused"
    impossible = found(-0.3, -0.11)
    verdict = gate.judge([impossible], ID)
    assert verdict.outcome == "FAIL" and verdict.reason == suspicion(impossible)
    assert "better than its parent by more than chance" in verdict.reason


def test_one_window_twenty_times_is_one_observation() -> None:
    """What a task gives to one window, which is all that copies of it are, passes no gate."""
    low, high = (end(paired_interval([0.01])) for end in (operator.itemgetter(1), operator.itemgetter(2)))
    one = replace(measured("quality_loss", 0.01, low, high, n=1), artifact_id=ID, parent_id=PARENT)
    assert Gate("quality_loss", at_most=1.0).judge([one], ID, Meant(parent_id=PARENT)).outcome == "FAIL"
