"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from gulliver.report.units import format_limit, format_measured, format_seconds, format_value


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (63_812_345, "bytes", "63.81 MB"), (72_000_000, "bytes", "72 MB"), (999, "bytes", "999 bytes"),
        (2.5e9, "bytes", "2.500 GB"), (0.0312, "fraction", "3.120 %"), (20.771, "ppl", "20.77 ppl"), (0, "ratio", "0"),
        (-0.01, "fraction", "−1 %"), (None, "ppl", "not measured"), (math.nan, "ppl", "not a number"),
        (1234567.0, "count", "1 234 567"), (math.inf, "", "infinity"),
    ],
)  # fmt: skip
def test_numbers_read_well(value: float | None, unit: str, text: str) -> None:
    assert format_value(value, unit).replace("\u00a0", " ").replace("\u202f", " ") == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.1, "ratio", "1.1"), (0.05, "fraction", "5 %"), (72_000_000, "bytes", "72 MB"), (0, "fraction", "0 %"),
        (84_500_000, "bytes", "84.5 MB"), (150, "tokens/s", "150 tokens/s"), (1234567, "", "1 234 567"),
    ],
)  # fmt: skip
def test_limits_are_shown_as_stated(value: float, unit: str, text: str) -> None:
    assert format_limit(value, unit).replace("\u00a0", " ").replace("\u202f", " ") == text


def test_intervals_have_the_digits_they_deserve() -> None:
    assert format_measured(20.7712, 20.4, 21.1, "ppl") == ("20.77\u00a0ppl", "20.40 to 21.10\u00a0ppl")
    assert format_measured(1e-9, -1e-9, 1e-9, "ratio")[1] == "0.000000 to 0.000000"
    assert format_measured(5, 5, 5, "count")[1] == "single value"
    assert format_measured(5, -math.inf, math.inf, "count")[1] == "no interval"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.26, "4.3 s"), (45, "45 s"), (99.7, "1 min 40 s"), (3599.9, "1 h 00 min"), (3700, "1 h 01 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds).replace("\u00a0", " ") == text


def test_a_duration_that_is_not_there_was_not_measured() -> None:
    assert format_seconds(None) == format_seconds(math.nan) == "not measured"
