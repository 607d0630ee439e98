"""What the options of steps and commands have in common: frozen, and a name that is not a field is an error.

A file of options imports pydantic and this alone, so that help and recipes are read without torch.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Options of one step or command; names of fields carry units, `description` is the help."""

    model_config = ConfigDict(frozen=True, extra="forbid")
