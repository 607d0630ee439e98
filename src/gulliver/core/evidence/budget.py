"""Budgets: bytes on disk, peak memory, speed on this machine, and the most quality one will give up."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from gulliver.core.errors import ConfigError
from gulliver.core.evidence.gate import Gate

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000 ** (power + 1) for power, letter in enumerate("kmgt")},
    **{f"{letter}ib": 1024 ** (power + 1) for power, letter in enumerate("kmgt")},
}
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})"
_SIZE = re.compile(_NUMBER + r"\s*([a-z]{0,3})", re.IGNORECASE)
_FRACTION = re.compile(_NUMBER + r"\s*(%?)")
_MAX_BYTES = 2**63 - 1


def parse_size(value: str | int, what: str = "size") -> int:
    """Bytes in "64MB" (10⁶), "64MiB" (2²⁰), "1.5GB", "65536" or 65536. ConfigError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    matched = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if matched is None or matched[2].lower() not in _UNITS:
        raise ConfigError(f"{what} is {value!r}; write a number of bytes with a unit, for example 64MB or 64MiB")
    size_bytes = int(Decimal(matched[1]) * _UNITS[matched[2].lower()])
    if not 1 <= size_bytes <= _MAX_BYTES:
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


@dataclass(frozen=True)
class Budget:
    """What the fitted model must meet. `max_drop` is the largest quality_loss, a fraction (0.05 is 5 %)."""

    size_bytes: int
    max_ram_bytes: int | None = None
    min_tokens_per_s: float | None = None
    max_drop: float | None = None
    speed_metric: str = ""  # what the family's speed is measured in; needed for the gate of min_tokens_per_s

    def __post_init__(self) -> None:
        for name in ("size_bytes", "max_ram_bytes", "min_tokens_per_s"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ConfigError(f"the budget's {name} is {limit}; it must be above 0")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ConfigError(f"the budget's max_drop is {self.max_drop}; it must be 0 or above, for example 0.05")

    def gates(self) -> list[Gate]:
        """The gates that a model within this budget passes, size first. ConfigError for a speed of no metric."""
        gates = [Gate("size_bytes", at_most=self.size_bytes)]
        if self.max_ram_bytes is not None:
            gates.append(Gate("compress_peak_ram_bytes", at_most=self.max_ram_bytes))
        if self.min_tokens_per_s is not None:
            if not self.speed_metric:
                raise ConfigError("the budget's min_tokens_per_s needs speed_metric, for example decode_tokens_per_s")
            gates.append(Gate(self.speed_metric, at_least=self.min_tokens_per_s))
        if self.max_drop is not None:
            gates.append(Gate("quality_loss", at_most=self.max_drop))
        return gates

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the four limits; null where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "speed_metric"}
