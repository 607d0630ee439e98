"""Sizes, fractions and seeds as a user writes them. Light: commands that answer within a second read options here."""

from __future__ import annotations

import re
from decimal import Decimal

from gulliver.core.errors import ConfigError

_UNITS = {
    **{"": 1, "b": 1},
    **{f"{letter}{b}": 1000 ** (power + 1) for power, letter in enumerate("kmgt") for b in ("", "b")},
    **{f"{letter}i{b}": 1024 ** (power + 1) for power, letter in enumerate("kmgt") for b in ("", "b")},
}
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})"
_SIZE = re.compile(_NUMBER + r"(e\+?[0-9]{1,2})?\s*([a-z]{0,3}|%)", re.IGNORECASE)
_FRACTION = re.compile(_NUMBER + r"\s*(%?)")
_LEAST_BARE = 10_000
"""A number below it without a unit is refused: it is more likely one of megabytes than one of bytes."""
MOST_BYTES = 2**63 - 1


def parse_size(value: str | float, what: str = "size", whole_bytes: int | None = None) -> int:
    """Bytes in "64MB" (10⁶), "64MiB" (2²⁰), "0.3G", "1e9", "65536" or 65536, and in "50%" of `whole_bytes`.

    ConfigError otherwise, for a small number without a unit, and for a percentage where nothing is the whole.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    written = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    matched = _SIZE.fullmatch(written.strip()) if isinstance(written, str) else None
    if matched is None or matched[3].lower() not in (*_UNITS, "%"):
        raise ConfigError(f"{what} is {value!r}; write a number of bytes with a unit, for example 64MB or 64MiB")
    number = Decimal(matched[1] + (matched[2] or ""))
    if matched[3] == "%":
        if whole_bytes is None:
            raise ConfigError(f"{what} is {value!r}, and a percentage has no meaning here; write it like 64MB or 64MiB")
        if not 0 < number <= 100:
            raise ConfigError(f"{what} is {value!r}; it must be above 0% and at most 100%, or a size like 64MB")
        return max(1, int(number * whole_bytes / 100))
    if not matched[3] and 0 < number < _LEAST_BARE:
        raise ConfigError(f"{what} is {value!r}: {number:f} bytes? Write {number:f}MB, or {number:f}B for bytes")
    size_bytes = int(number * _UNITS[matched[3].lower()])
    if not 1 <= size_bytes <= MOST_BYTES:
        raise ConfigError(f"{what} is {value!r}; it must be at least one byte and fit in 64 bits, for example 64MB")
    return size_bytes


def parse_fraction(value: str | float, what: str = "fraction") -> float:
    """0.05 from "5%", "0.05" or 0.05. ConfigError for others, and for a plain 1 or more (which could mean either)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = format(Decimal(str(value)), "f") if abs(value) < 1e15 else str(value)
    matched = _FRACTION.fullmatch(value.strip()) if isinstance(value, str) else None
    if matched is None:
        raise ConfigError(f"{what} is {value!r}; write a percentage or a fraction, for example 5% or 0.05")
    number = Decimal(matched[1])
    if matched[2]:
        return float(number / 100)
    if number >= 1:
        raise ConfigError(f"{what} is {value!r}; that could mean {value}% or {value} times: write 5% or 0.05")
    return float(number)


def checked_seed(value: int) -> int:
    """The seed itself. ConfigError for what is not a whole number from 0 to 2⁶³-1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_BYTES:
        raise ConfigError(f"seed is {value!r}; it must be a whole number from 0 to {MOST_BYTES}")
    return value
