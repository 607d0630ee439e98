"""Fingerprints of units of data, to refuse a measurement on what a model was calibrated or trained on.

What a unit is (a paragraph, a picture, a user's history) is the family's affair: `Task.units`. A unit's fingerprint is
the first 16 hex digits of the SHA-256 of its UTF-8 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def fingerprint(unit: str) -> str:
    """First 16 hex digits of the SHA-256 of the unit's UTF-8 bytes."""
    return hashlib.sha256(unit.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def fingerprints(units: Iterable[str]) -> list[str]:
    """Sorted fingerprints of all `units`, each once."""
    return sorted({fingerprint(unit) for unit in units})


def first_overlap(units: Iterable[str], known: Iterable[str]) -> str | None:
    """The first of `units` whose fingerprint is among `known`; None when there is none."""
    seen = frozenset(known)
    return next((unit for unit in units if fingerprint(unit) in seen), None)


def excerpt(unit: str, characters: int = 80) -> str:
    """The start of a unit, on one line, for an error message."""
    line = " ".join(unit.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"
