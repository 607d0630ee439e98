"""What a family's data and windows need: a frozen pydantic model each, carried by steps as the field `family`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import AfterValidator, Field, ValidationError

from gulliver.core.errors import ConfigError
from gulliver.core.names import unknown
from gulliver.core.options import Options
from gulliver.tasks import family


def _known(name: str | None) -> str | None:
    if name is not None:
        family(name)
    return name


KnownTask = AfterValidator(_known)
"""What a step's option is checked by that names a family. ConfigError, which names the nearest, for any other name."""


class FamilyOptions(Options):
    """The base of every family's options; a family without any uses it as it is."""


class TextOptions(FamilyOptions):
    """What families that read text have in common."""

    tokens: int = Field(512, ge=2, description="tokens of a window or of a text that is written; longer ones are cut")
    holdout: float = Field(0.1, gt=0, lt=1, description="fraction of the text held out when eval_data is not given")
    text_column: str = Field("text", description="column of .jsonl and .parquet files that holds the text")


class LanguageOptions(TextOptions):
    """Options of the language family."""

    windows: int = Field(24, ge=2, description="windows of text that are scored")
    context: int = Field(1024, ge=2, description="tokens in a window that is scored")
    questions: int = Field(100, ge=0, le=10000, description="cloze and choice questions made of held-out text; 0: none")


class EncoderOptions(TextOptions):
    """Options of the encoder family."""

    texts: int = Field(256, ge=2, description="texts that are scored")


def checked_options(family: str, kind: type[FamilyOptions], values: Mapping[str, Any]) -> FamilyOptions:
    """`values` as the options of a family. ConfigError names the option that is unknown or wrong, and the remedy."""
    for name in values:
        if name not in kind.model_fields:
            known = unknown("option", name, kind.model_fields) if kind.model_fields else f"unknown option {name!r}"
            raise ConfigError(f"the {family} family: {known}; leave it out")
    try:
        return kind(**values)
    except ValidationError as failure:
        problem = failure.errors(include_url=False)[0]
        name = str(problem["loc"][0]) if problem["loc"] else ""
        about = kind.model_fields[name].description if name in kind.model_fields else ""
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        raise ConfigError(f"{name} = {problem['input']!r} is not valid: {message} ({about})") from None
