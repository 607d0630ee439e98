"""A check that cannot fail is a defect: for every metric that can be gated, all evidence that must be refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gulliver.core.errors import GateRefused
from gulliver.core.evidence.evidence import METRICS, MUST_BEAT, Evidence, measured
from gulliver.core.evidence.gate import Budget, Gate, require

ID, OTHER = "a" * 64, "b" * 64
GATED = [name for name, row in METRICS.items() if row.direction != "none"]


def gate_at_one(name: str) -> Gate:
    return Gate(name, at_most=1.0) if METRICS[name].direction == "lower" else Gate(name, at_least=1.0)


def good(name: str, artifact_id: str = ID) -> Evidence:
    """Evidence that passes `gate_at_one`, so that each refusal below has one cause."""
    value = 0.5 if METRICS[name].direction == "lower" else 2.0
    return replace(measured(name, value, low=value - 0.1, high=value + 0.1, n=24), artifact_id=artifact_id)


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
