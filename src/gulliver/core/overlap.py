"""Fingerprints of units of data, to refuse a measurement on what a model was calibrated or trained on.

What a unit is (a paragraph, a picture, a user's history) is the family's affair: `Task.units`. A unit's fingerprint is
the first 16 hex digits of the SHA-256 of its UTF-8 bytes.

Short phrases recur in any text by chance ("Yes."), so of them only the share is judged: `shared_phrases`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

MAX_SHARED = 0.5
"""Most of the eval part, by characters, that may be phrases of the train part. Measured on a tenth that was held out

(docs/log.md): encyclopedia 0.4 %, code 7 %, dialogues one turn a line 19 %; texts of lines that repeat 97-100 %.
"""


class Shared(NamedTuple):
    """`share` of one part's characters is in phrases that are in the other too, such as `longest`."""

    share: float
    longest: str


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


def shared_phrases(phrases: Iterable[str], known: Iterable[str]) -> Shared:
    """How much of `phrases`, by characters, is among `known`; those are read one by one and not kept."""
    characters: dict[str, int] = {}
    for phrase in phrases:
        characters[phrase] = characters.get(phrase, 0) + len(phrase)
    total = sum(characters.values())
    shared = {phrase for phrase in known if phrase in characters}
    longest = max(shared, key=lambda phrase: (len(phrase), phrase), default="")
    return Shared(sum(characters[phrase] for phrase in shared) / max(total, 1), longest)


def excerpt(unit: str, characters: int = 80) -> str:
    """The start of a unit, on one line, for an error message."""
    line = " ".join(unit.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"
