"""What all records share: canonical JSON, written whole or not at all, and one strict reader.

What is read is hostile until it passed: a file that is too large, truncated, not strict JSON, or that has a key too
many, one too few or a value of another type is an ArtifactError that names the file, the key and the remedy.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import write_atomic
from gulliver.core.store.manifest import MAX_INTEGER, read_json

Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


class Row(BaseModel):
    """A part of a record: frozen, every key known, no value converted, no number infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Record(Row):
    """One file. `former` is what earlier versions called it, `remedy` what mends a bad one."""

    file: ClassVar[str]
    former: ClassVar[str | None] = None
    remedy: ClassVar[str]
    max_bytes: ClassVar[int] = 64 * 2**20

    def write(self, folder: Path) -> None:
        """Write the file into `folder`, whole or not at all; equal records give equal bytes."""
        body = self.model_dump(mode="json", exclude_none=True)
        text = json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(folder / self.file, text)

    @classmethod
    def name_in(cls, names: Iterable[str]) -> str | None:
        """Which of the names is this file, by its name of today or the former one; None when none is."""
        found = set(names)
        return next((name for name in (cls.file, cls.former) if name in found), None)

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """The record in an artifact. ArtifactError when it has none, or a bad one."""
        name = cls.name_in(artifact.files) or cls.file
        return cls.parse(_bounded(artifact.file(name), cls), f"{name} of {artifact.id[:12]}")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in a folder. ArtifactError when there is none, or a bad one."""
        name = next((name for name in (cls.file, cls.former) if name and (folder / name).is_file()), cls.file)
        return cls.parse(_bounded(folder / name, cls), str(folder / name))

    @classmethod
    def parse(cls, data: bytes, what: str) -> Self:
        """The record in the bytes of a file, called `what` in an error."""
        if len(data) > cls.max_bytes:
            raise ArtifactError(f"{what} has more than the {cls.max_bytes} bytes that are allowed; {cls.remedy}")
        try:
            read_json(data, what)  # duplicate keys and numbers beyond 64 bits, which pydantic would take
            return cls.model_validate_json(data)
        except ArtifactError as error:
            raise ArtifactError(f"{error}; {cls.remedy}") from None
        except ConfigError as error:  # of evidence or a gate, which are checked where they are made
            raise ArtifactError(f"{what}: {error}; {cls.remedy}") from None
        except ValidationError as error:
            raise ArtifactError(f"{what}: {_first_problem(error)}; {cls.remedy}") from None


def _bounded(path: Path, record: type[Record]) -> bytes:
    """The bytes of a file that is not larger than a record of its kind may be."""
    try:
        with open(path, "rb") as stream:
            return stream.read(record.max_bytes + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; {record.remedy}") from None


def _first_problem(error: ValidationError) -> str:
    """Place, value and rule of the first thing that is wrong."""
    problem = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:200]}" for part in problem["loc"]).lstrip(".")
    if problem["type"] == "missing":
        return f"{place} is missing"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {place}"
    rule = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{place or 'the whole'} is {reprlib.repr(problem['input'])}; {rule}"
