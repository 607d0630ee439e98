"""The error tree. Every expected failure is one of these, says what was wrong, names the value and the remedy.

GulliverError            exit 1
  ConfigError            exit 2   a wrong option, key or value
  DataError              exit 2   data that cannot be read, or must not be used as asked
  ArtifactError          exit 2   an artifact that is damaged, hostile or missing
  StorageError           exit 2   a disk, a database or a lock that cannot be used now
  MissingExtra           exit 2   an optional package is needed; prints the pip command
  GateRefused            exit 3   evidence did not meet a gate, or there is none
  BudgetError            exit 4   no model meets the budget; names the nearest that is feasible
  KernelError            exit 1   a native kernel failed or is absent
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FOREIGN = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What code of others raises when it meets what it does not expect: a network of transformers, run another way."""


def first_line(error: BaseException | str) -> str:
    """What another's error says, as one line that a terminal only shows."""
    line, *more = (str(error).strip() or _nothing_said(error)).splitlines()
    line = " ".join([line, *(more[:1] if line.endswith(":") else ())])[:200]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _nothing_said(error: BaseException | str) -> str:
    return "no reason given" if isinstance(error, str) else type(error).__name__


class GulliverError(Exception):
    """Base of all expected failures; its text is shown to the user without a traceback."""

    exit_code = 1


class ConfigError(GulliverError):
    """A wrong option, key or value."""

    exit_code = 2


class DataError(GulliverError):
    """Data that cannot be read, or must not be used as asked."""

    exit_code = 2


class ArtifactError(GulliverError):
    """An artifact that is damaged, hostile or missing."""

    exit_code = 2


class StorageError(GulliverError):
    """A disk, a database or a lock that cannot be used now; the same command may succeed later."""

    exit_code = 2


class MissingExtra(GulliverError):
    """An optional package is needed."""

    exit_code = 2

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional package; install it with: pip install 'gulliver[{extra}]'")


class GateRefused(GulliverError):
    """Evidence did not meet a gate, or there is none."""

    exit_code = 3


class BudgetError(GulliverError):
    """No model meets the budget. `nearest` is the nearest point that is feasible, {"size_bytes", …}, if known."""

    exit_code = 4

    def __init__(self, message: str, nearest: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class KernelError(GulliverError):
    """A native kernel failed or is absent."""
