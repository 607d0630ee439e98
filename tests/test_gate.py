"""Gates: what they accept as a rule, and how they judge."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from gulliver.core.errors import ConfigError, GateRefused
from gulliver.core.evidence.evidence import METRICS, Evidence, measured
from gulliver.core.evidence.gate import Gate, require

ID, OTHER = "a" * 64, "b" * 64


def about(artifact_id: str, *args: Any, **options: Any) -> Evidence:
    return replace(measured(*args, **options), artifact_id=artifact_id)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "perplexity_ration", "at_most": 1.0}, "did you mean 'perplexity_ratio'"),
        ({"metric": "perplexity"}, "exactly one of at_most and at_least; it has none"),
        ({"metric": "perplexity", "at_most": 1, "at_least": 0}, "exactly one"),
        ({"metric": "perplexity", "at_least": 1.0}, "lower is better, so write at_most instead of at_least"),
        ({"metric": "accuracy", "at_most": 1.0}, "higher is better, so write at_least instead of at_most"),
        ({"metric": "parameter_count", "at_most": 1.0}, "cannot be gated"),
        ({"metric": "baseline_accuracy", "at_least": 0.1}, "cannot be gated"),
        ({"metric": "perplexity", "at_most": math.nan}, "must be a finite number"),
        ({"metric": "perplexity", "at_most": math.inf}, "must be a finite number"),
        ({"metric": "perplexity", "at_most": 10**400}, "must be a finite number"),
        ({"metric": "perplexity", "at_most": True}, "must be a finite number"),
        ({"metric": "perplexity", "at_most": "1.05"}, "must be a finite number"),
    ],
)
def test_a_wrong_rule_is_an_error_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gate(**arguments)


def test_the_worse_end_decides() -> None:
    gate = Gate("perplexity_ratio", at_most=1.05)
    assert gate.judge([about(ID, "perplexity_ratio", 1.02, low=1.0, high=1.05)], ID).outcome == "PASS"
    verdict = gate.judge([about(ID, "perplexity_ratio", 1.02, low=0.99, high=1.051)], ID)
    assert verdict.outcome == "FAIL" and not verdict.passed
    assert "upper bound 1.051 misses 1.05" in verdict.reason
    gate = Gate("accuracy", at_least=0.9)
    assert gate.judge([about(ID, "accuracy", 0.95, low=0.9, high=1.0)], ID).passed
    assert gate.judge([about(ID, "accuracy", 0.95, low=0.89, high=1.0)], ID).outcome == "FAIL"


def test_the_newest_measurement_on_a_data_set_counts_and_the_worst_data_set_decides() -> None:
    gate = Gate("perplexity_ratio", at_most=1.05)
    few = about(ID, "perplexity_ratio", 1.02, low=0.9, high=1.2, n=2, data_hash="wiki")
    many = about(ID, "perplexity_ratio", 1.02, low=1.01, high=1.03, n=90, data_hash="wiki")
    plays = about(ID, "perplexity_ratio", 1.2, low=1.1, high=1.3, data_hash="plays")
    assert gate.judge([few, many], ID).passed
    assert gate.judge([many, few], ID).outcome == "FAIL"
    verdict = gate.judge([few, plays, many], ID)
    assert verdict.outcome == "FAIL" and verdict.evidence == plays


def test_the_rule_and_the_json_say_what_was_judged() -> None:
    gate = Gate("size_bytes", at_most=64_000_000)
    verdict = gate.judge([about(ID, "size_bytes", 63_999_999)], ID)
    assert gate.rule == "size_bytes <= 6.4e+07"
    assert verdict.to_json()["evidence"]["value"] == 63_999_999.0
    assert {key: verdict.to_json()[key] for key in ("metric", "at_most", "at_least", "outcome")} == {
        "metric": "size_bytes",
        "at_most": 64_000_000,
        "at_least": None,
        "outcome": "PASS",
    }


def test_require_lists_every_refusal() -> None:
    good = Gate("size_bytes", at_most=10).judge([about(ID, "size_bytes", 9)], ID)
    bad = Gate("size_bytes", at_most=8).judge([about(ID, "size_bytes", 9)], ID)
    none = Gate("accuracy", at_least=0.5).judge([], ID)
    require([good])
    with pytest.raises(GateRefused) as error:
        require([good, bad, none])
    text = str(error.value)
    assert text.startswith("2 of 3 gates refused") and "FAIL  size_bytes <= 8" in text
    assert "NO_DATA  accuracy >= 0.5" in text and "gulliver audit" in text
    assert error.value.exit_code == 3


def test_every_metric_with_a_direction_can_be_gated() -> None:
    for name, row in METRICS.items():
        if row.direction != "none":
            side = "at_most" if row.direction == "lower" else "at_least"
            assert Gate(name, **{side: 1.0}).judge([about(ID, name, 1.0)], ID).evidence is not None
