"""Budgets: sizes and fractions as people write them, and limits that make sense."""

from __future__ import annotations

import math
import re

import pytest

from gulliver.core.errors import ConfigError
from gulliver.core.evidence.gate import Budget
from gulliver.core.quantities import parse_fraction, parse_size


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("64MB", 64_000_000),
        ("64MiB", 64 * 2**20),
        ("64 mb", 64_000_000),
        (" 1.5GB ", 1_500_000_000),
        ("1.1MB", 1_100_000),
        (".5kB", 500),
        ("2KiB", 2048),
        ("3TB", 3 * 10**12),
        ("3TiB", 3 * 2**40),
        ("65536", 65_536),
        ("512B", 512),
        (65_536, 65_536),
        ("1e9", 10**9),
        ("1E+9", 10**9),
        (1e9, 10**9),
        ("1.5e3MB", 1_500_000_000),
        ("0.3G", 300_000_000),
        ("0.3g", 300_000_000),
        ("64M", 64_000_000),
        ("2Gi", 2 * 2**30),
        ("1.9999B", 1),
    ],
)
def test_sizes(written: str | int, size_bytes: int) -> None:
    assert parse_size(written) == size_bytes


@pytest.mark.parametrize(("written", "size_bytes"), [("50%", 500_000), (" 12.5 %", 125_000), ("100%", 1_000_000)])
def test_a_size_as_a_share_of_the_parent(written: str, size_bytes: int) -> None:
    assert parse_size(written, whole_bytes=1_000_000) == size_bytes


@pytest.mark.parametrize("written", ["0%", "101%", "-5%", "%", "1e9%"])
def test_a_share_that_is_none(written: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(written))):
        parse_size(written, whole_bytes=1_000_000)


@pytest.mark.parametrize("written", ["64", 64, "64.0", "4096", "0.5", 9999])
def test_a_small_number_without_a_unit_is_asked_about(written: str | int) -> None:
    with pytest.raises(ConfigError, match=rf"{written} bytes\? Write {written}MB, or {written}B for bytes"):
        parse_size(written, "--size")


@pytest.mark.parametrize(
    "written",
    [
        "",
        "MB",
        "64 megabytes",
        "-1MB",
        "0",
        0,
        "0.4B",
        "1e",
        "1e-3GB",
        "1e999",
        "50%",
        "64",
        64,
        "1,5GB",
        "64MBB",
        "nan",
        True,
        None,
        64.5,
        "9" * 15 + "TiB",
    ],
)
def test_wrong_sizes_name_the_value_and_an_example(written: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse_size(written, "--size")  # type: ignore[arg-type]
    assert repr(written) in str(error.value) and "64MB" in str(error.value) and "--size" in str(error.value)


@pytest.mark.parametrize(
    ("written", "fraction"),
    [("5%", 0.05), ("0.05", 0.05), (0.05, 0.05), ("3.4 %", 0.034), ("150%", 1.5), ("0", 0.0), (0, 0.0), (1e-7, 1e-7)],
)
def test_fractions(written: str | float, fraction: float) -> None:
    assert parse_fraction(written) == fraction


@pytest.mark.parametrize("written", ["5", 5, 1, "1.0", "-5%", -0.1, "%", "", "5%%", math.nan, math.inf, None, True])
def test_wrong_fractions_name_the_value_and_an_example(written: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse_fraction(written, "--max-drop")  # type: ignore[arg-type]
    assert "5%" in str(error.value) and "0.05" in str(error.value) and "--max-drop" in str(error.value)


def test_a_plain_number_of_one_or_more_is_ambiguous() -> None:
    with pytest.raises(ConfigError, match="could mean"):
        parse_fraction("5")


def test_a_budget_makes_one_gate_for_each_limit() -> None:
    assert [gate.rule for gate in Budget(100).gates()] == ["size_bytes <= 100"]
    full = Budget(100, max_ram_bytes=200, min_tokens_per_s=3.5, max_drop=0.0, speed_metric="decode_tokens_per_s")
    assert [gate.rule for gate in full.gates()] == [
        "size_bytes <= 100",
        "compress_peak_ram_bytes <= 200",
        "decode_tokens_per_s >= 3.5",
        "quality_loss <= 0",
    ]
    assert full.to_json() == {"size_bytes": 100, "max_ram_bytes": 200, "min_tokens_per_s": 3.5, "max_drop": 0.0}


def test_a_speed_without_its_metric_makes_no_gate() -> None:
    budget = Budget(100, min_tokens_per_s=3.5)
    with pytest.raises(ConfigError, match="needs speed_metric"):
        budget.gates()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"size_bytes": 0}, "size_bytes is 0"),
        ({"size_bytes": 1, "max_ram_bytes": -1}, "max_ram_bytes is -1"),
        ({"size_bytes": 1, "min_tokens_per_s": 0.0}, "min_tokens_per_s is 0.0"),
        ({"size_bytes": 1, "min_tokens_per_s": math.nan}, "min_tokens_per_s is nan"),
        ({"size_bytes": 1, "max_drop": -0.1}, "max_drop is -0.1"),
        ({"size_bytes": 1, "max_drop": math.nan}, "max_drop is nan"),
        ({"size_bytes": 1, "max_drop": 5.0}, "max_drop is 5; it must be a fraction from 0 to 1"),
        ({"size_bytes": 1, "min_tokens_per_s": math.inf}, "min_tokens_per_s is inf"),
        ({"size_bytes": 1, "min_tokens_per_s": True}, "min_tokens_per_s is True"),
        ({"size_bytes": 1, "max_ram_bytes": True}, "max_ram_bytes is True"),
        ({"max_ram_bytes": 1}, "needs a size or a largest drop"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**limits)  # type: ignore[arg-type]
