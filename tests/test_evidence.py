"""Evidence: the table of metrics, intervals against an oracle, and JSON that survives NaN and refuses lies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.evidence.evidence import METRICS, MUST_BEAT, Evidence, measured, metric, paired_interval
from gulliver.core.records import SpeedReport


def test_every_metric_says_unit_direction_and_meaning() -> None:
    for name, row in METRICS.items():
        assert name.islower() and row.unit and row.help, name
        assert row.direction in ("lower", "higher", "none"), name
        assert "\n" not in row.help and len(row.help) < 90, name
    assert all(METRICS[name].direction != "none" for name in MUST_BEAT)
    assert all(name.removesuffix("_vs_baseline") in METRICS for name in MUST_BEAT)


def test_the_table_in_the_documentation_is_this_one() -> None:
    text = (Path(__file__).parents[1] / "docs" / "evidence.md").read_text()
    rows = [f"| `{name}` | {row.unit} | {row.direction} | {row.help} |" for name, row in METRICS.items()]
    assert "\n".join(rows) in text


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'perplexty'; did you mean 'perplexity'"):
        metric("perplexty")
    with pytest.raises(ConfigError, match="there are: accuracy"):
        metric("zzz")
    with pytest.raises(ConfigError, match="unknown metric"):
        measured("beauty", 1.0)


def test_unit_direction_and_order_are_checked() -> None:
    fields = {"metric": "perplexity", "value": 2.0, "low": 1.0, "high": 3.0, "n": 4}
    Evidence(**fields, unit="ppl", direction="lower")
    with pytest.raises(ConfigError, match="METRICS says 'ppl'"):
        Evidence(**fields, unit="nat", direction="lower")
    with pytest.raises(ConfigError, match="direction 'higher'"):
        Evidence(**fields, unit="ppl", direction="higher")
    with pytest.raises(ConfigError, match="lies outside"):
        measured("perplexity", 4.0, low=1.0, high=3.0)
    with pytest.raises(ConfigError, match="n = -1"):
        measured("perplexity", 4.0, n=-1)


def test_the_worse_end_is_the_one_a_gate_must_judge() -> None:
    assert measured("perplexity", 2, low=1, high=3).worse_end == 3
    assert measured("accuracy", 0.5, low=0.4, high=0.6).worse_end == 0.4
    assert math.isnan(measured("parameter_count", 5).worse_end)
    assert math.isnan(measured("perplexity", math.nan).worse_end)
    rounded = measured("perplexity", 2 + 1e-12, low=2, high=2)
    assert rounded.worse_end == 2 + 1e-12


def test_filled_fills_only_what_is_empty() -> None:
    item = measured("accuracy", 0.5).filled(machine="m", parent_id="p", command="c")
    assert (item.machine, item.parent_id, item.command) == ("m", "p", "c")
    assert item.filled(machine="other").machine == "m"


# ---- intervals ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "confidence"), [(2, 0.95), (5, 0.9), (24, 0.95), (1000, 0.99)])
def test_the_interval_is_students(count: int, confidence: float) -> None:
    values = np.random.default_rng(count).normal(0.3, 2.0, count)
    mean, low, high = paired_interval(values, confidence)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        _, low, high = paired_interval(generator.normal(1.0, 1.0, 8))
        covered += low <= 1.0 <= high
    assert 930 <= covered <= 968


def test_pairing_beats_pooling() -> None:
    """The windows' own spread is a hundred times the effect; paired it is certain, pooled it is not."""
    generator = np.random.default_rng(1)
    parent = generator.normal(3.0, 1.0, 24)
    model = parent + generator.normal(0.01, 0.005, 24)
    assert paired_interval(model - parent)[1] > 0
    assert stats.ttest_ind(model, parent).confidence_interval().low < 0


def test_intervals_of_too_little_or_bad_data() -> None:
    assert paired_interval([2.0]) == (2.0, -math.inf, math.inf)
    assert paired_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert paired_interval(iter([1.0, math.inf])) == (math.inf, -math.inf, math.inf)
    for bad in ([1.0, math.nan], [math.inf, -math.inf], [math.nan]):
        assert all(math.isnan(number) for number in paired_interval(bad))
    with pytest.raises(DataError, match="no differences"):
        paired_interval([])
    for confidence in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            paired_interval([1.0, 2.0], confidence)


# ---- JSON ---------------------------------------------------------------------------------------------------------
def read(row: dict[str, Any]) -> Evidence:
    """The evidence of a row in a file."""
    return SpeedReport.parse(json.dumps({"model": "a" * 64, "evidence": [row]}).encode(), "speed.json").evidence[0]


@pytest.mark.parametrize("value", [1.5, 0.1 + 0.2, 1e300, math.inf, -math.inf, math.nan])
def test_json_keeps_every_number(value: float) -> None:
    item = measured("perplexity", value, n=3, seed=2**40, data_hash="d", detail={"windows": [1, 2]})
    assert json.dumps(item.to_json(), allow_nan=False) and repr(read(item.to_json())) == repr(item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "1"}, r"\.value is '1'; it should be a valid number"),
        ({"value": True}, r"\.value is True"),
        ({"low": [1]}, r"\.low is \[1\]"),
        ({"n": 2.0}, r"\.n is 2.0; it should be a valid integer"),
        ({"n": True}, r"\.n is True"),
        ({"machine": None}, r"\.machine is None; it should be a valid string"),
        ({"parent_id": 3}, r"\.parent_id is 3"),
        ({"detail": []}, r"\.detail is \[\]"),
        ({"direction": "higher"}, "METRICS says"),
        ({"metric": "perplexty"}, "did you mean 'perplexity'"),
        ({"vallue": 1}, r"unknown key evidence\[0\]\.vallue"),
        ({"value": 9.0}, "lies outside"),
    ],
)
def test_json_from_a_stranger_is_checked(change: dict[str, object], message: str) -> None:
    row = {**measured("perplexity", 2.0, low=1.0, high=3.0).to_json(), **change}
    with pytest.raises(ArtifactError, match=message):
        read(row)


def test_json_with_a_field_missing_is_refused() -> None:
    row = measured("perplexity", 2.0).to_json()
    for name in row:
        with pytest.raises(ArtifactError, match=f"field {name} is missing"):
            read({key: value for key, value in row.items() if key != name})
