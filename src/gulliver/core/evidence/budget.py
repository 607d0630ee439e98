"""Budgets: bytes on disk, peak memory, speed on this machine, and the most quality one will give up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gulliver.core.errors import ConfigError
from gulliver.core.evidence.gate import Gate


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
