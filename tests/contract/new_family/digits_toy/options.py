"""What sequences of digits need."""

from __future__ import annotations

from pydantic import Field

from gulliver.tasks.options import FamilyOptions


class DigitsOptions(FamilyOptions):
    """Options of the digits family."""

    held_out: float = Field(0.25, gt=0, lt=1, description="fraction of the sequences held out without eval_data")
