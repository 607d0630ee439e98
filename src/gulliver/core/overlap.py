"""Fingerprints of examples, to refuse a measurement on what a model was calibrated or trained on.

A text's units are its lines and its paragraphs (runs of lines without a blank one) of at least 200 characters, stripped
of surrounding space; any other value of an example is one unit. A unit's fingerprint is the first 16 hex digits of
the SHA-256 of its bytes. Two texts overlap when they share a unit, however each was cut or wrapped around it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MIN_CHARACTERS = 200
"""Shorter passages stand in many texts by chance (headings, set phrases)."""


def paragraphs(text: str) -> Iterator[str]:
    """The units of `text`, each at least MIN_CHARACTERS long, in order; a line that is its own paragraph once."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            block.append(line)
            continue
        whole = "\n".join(block).strip()
        if len(whole) >= MIN_CHARACTERS:
            yield whole
        if len(block) > 1:
            yield from (inner.strip() for inner in block if len(inner.strip()) >= MIN_CHARACTERS)
        block = []


def fingerprint(unit: str) -> str:
    """First 16 hex digits of the SHA-256 of the unit's UTF-8 bytes."""
    return hashlib.sha256(unit.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def units(example: Mapping[str, Any]) -> Iterator[str]:
    """The units of one example: its text's paragraphs, or the whole example when it has no text."""
    if isinstance(example.get("text"), str):
        yield from paragraphs(example["text"])
    else:
        plain = {key: value for key, value in example.items() if key not in ("split", "source")}
        yield json.dumps(plain, sort_keys=True, default=lambda value: value.tolist())


def fingerprints(examples: Iterable[Mapping[str, Any]]) -> list[str]:
    """Sorted fingerprints of all units of `examples`, each once."""
    return sorted({fingerprint(unit) for example in examples for unit in units(example)})


def first_overlap(examples: Iterable[Mapping[str, Any]], known: Iterable[str]) -> str | None:
    """The first unit of `examples` whose fingerprint is among `known`; None when there is none."""
    seen = frozenset(known)
    for example in examples:
        for unit in units(example):
            if fingerprint(unit) in seen:
                return unit
    return None


def excerpt(unit: str, characters: int = 80) -> str:
    """The start of a unit, on one line, for an error message."""
    line = " ".join(unit.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"
