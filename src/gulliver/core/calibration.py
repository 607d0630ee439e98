"""`calibration.json`: what a model was calibrated or trained on, so that it is never measured on it."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Self

import numpy as np
from pydantic import AfterValidator, AliasChoices, Field, StringConstraints

from gulliver.core.overlap import FULL, KEPT, Sample, Seen
from gulliver.core.record import Record, Row


def _decoded(value: str) -> str:
    try:
        whole = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it must be numbers of 64 bits in base64") from None
    if len(whole) % 8 or len(whole) > 8 * KEPT:
        raise ValueError(f"it must be at most {KEPT} numbers of 64 bits in base64")
    return value


class SampleRow(Row):
    """The hashes of a text below `bound`: little-endian numbers of 64 bits, sorted, in base64."""

    bound: Annotated[int, Field(ge=0, le=FULL)]
    hashes: Annotated[str, AfterValidator(_decoded)]

    @classmethod
    def of(cls, sample: Sample) -> Self:
        """The row that holds a sample."""
        return cls(bound=sample.bound, hashes=base64.b64encode(sample.hashes.astype("<u8").tobytes()).decode())

    def sample(self) -> Sample:
        """The sample that it holds."""
        return Sample(self.bound, np.sort(np.frombuffer(base64.b64decode(self.hashes), "<u8").astype(np.uint64)))


class SeenRow(Row):
    """What is remembered of one text (core/overlap.py)."""

    lines: SampleRow
    runs: SampleRow
    own: Annotated[float, Field(ge=0, le=1)]

    @classmethod
    def of(cls, seen: Seen) -> Self:
        """The row that holds what is remembered."""
        return cls(lines=SampleRow.of(seen.lines), runs=SampleRow.of(seen.runs), own=seen.own)

    def seen(self) -> Seen:
        """What it remembers."""
        return Seen(self.lines.sample(), self.runs.sample(), self.own)


class Calibration(Record):
    """What a model was calibrated or trained on: the first data set, and sorted fingerprints of all units.

    `seen` is what is remembered of the text of each data set (core/overlap.py); earlier versions kept none.
    """

    file = "calibration.json"
    remedy = "calibrate again"
    max_bytes = 2**30

    dataset: str
    fingerprints: tuple[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")], ...] = Field(
        validation_alias=AliasChoices("fingerprints", "paragraph_sha256_16")
    )
    seen: tuple[SeenRow, ...] = ()
