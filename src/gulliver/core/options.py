"""What the options of steps and commands have in common: frozen, and a name that is not a field is an error.

A file of options imports pydantic and this, so that help and recipes are read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from gulliver.core.store.manifest import MAX_INTEGER

MaxRam = Annotated[int | None, Field(ge=1, description="most resident memory of the process")]
"""The field `max_ram_bytes` of a step that keeps to it (`Context.check_ram`); `resolved` says all that it decides."""


class Options(BaseModel):
    """Options of one step or command; names of fields carry units, `description` is the help."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        parts = {annotation, *get_args(annotation)}
        kinds = {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("must be a number, not true or false")
        return value

    @field_validator("*")
    @classmethod
    def _fits_in_a_record(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ValueError(f"must be at most {MAX_INTEGER}")
        return value

    def resolved(self, inputs: Mapping[str, Any]) -> Self:
        """These options with "auto", and all that a limit decides, replaced by what it comes to for these inputs.

        The reuse key is made of the result, so it may depend on nothing but the options and the inputs' contents.
        """
        return self

    def files(self, field: str) -> Any:
        """The local files that `field` names (one, several or a folder), whose contents belong to the reuse key."""
        return getattr(self, field)
