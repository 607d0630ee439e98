"""What is known of a model folder that was written as a plain one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rewritten:
    """`format` is what the weights were stored as; `notes` are sentences about what was left out and taken."""

    format: str
    notes: tuple[str, ...]
