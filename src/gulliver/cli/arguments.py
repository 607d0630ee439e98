"""The one generator: a model of options -> the arguments of a command, as records.

The command line, parsers.json and docs/commands.md are made from these records. parsers.json keeps those of all tables,
so that `--help` and a cold `generate` import no pydantic; `make docs` writes it, a test compares it with the models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from gulliver.core.names import named
from gulliver.pipeline.steps import fields_of, type_name

PARSERS = Path(__file__).parent / "parsers.json"
"""{"module:class of options": [the fields of each Argument that are not its defaults]}"""
MODEL_HELP = "an artifact id, a folder, a .gguf file, catalog:NAME or hf:ORG/NAME"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Argument:
    """One argument of a command, made from one field of a model.

    `kind` is what its text is read as: text, int, float or switch; `takes` is its type as users write about it.
    `positional` has no flag; `many` may be given more than once. `bounds` are those of BOUNDS.
    """

    name: str
    kind: str
    takes: str
    help: str
    default: Any = None
    required: bool = False
    positional: bool = False
    many: bool = False
    metavar: str = ""
    group: str = ""
    bounds: dict[str, float] = field(default_factory=dict)

    @property
    def flag(self) -> str:
        """What is written on the command line: "--group-size"; a trailing underscore of the field is left out."""
        return f"--{self.name.rstrip('_').replace('_', '-')}"

    @property
    def about(self) -> str:
        """The help with the default, where there is one that says something."""
        if self.default in (None, "", []) or (self.kind == "switch" and not self.default):
            return self.help
        return f"{self.help} (default {f'{self.default:g}' if self.kind == 'float' else self.default})"

    def to_json(self) -> dict[str, Any]:
        """The fields that are not what they are when left out."""
        blank = vars(Argument("", "", "", ""))
        return {name: value for name, value in vars(self).items() if value != blank[name]}


def arguments(options: str) -> list[Argument]:
    """The arguments of a model of options, named as "module:class"; from parsers.json where they are kept there."""
    kept = _kept().get(options)
    return made(options) if kept is None else [Argument(**row) for row in kept]


def made(options: str) -> list[Argument]:
    """The same, always from the model itself."""
    found = fields_of(named(options))
    return [_argument(name, info, first=name == next(iter(found))) for name, info in found.items()]


def parsers_json(options: Iterable[str]) -> str:
    """The text of parsers.json for these models."""
    blocks = []
    for name in sorted(set(options)):
        rows = [json.dumps(argument.to_json(), ensure_ascii=False) for argument in made(name)]
        blocks.append(f"{json.dumps(name)}: [\n " + ",\n ".join(rows) + "\n]")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


@cache
def _kept() -> dict[str, list[dict[str, Any]]]:
    return json.loads(PARSERS.read_text(encoding="utf-8")) if PARSERS.is_file() else {}


def _argument(name: str, info: Any, *, first: bool) -> Argument:
    """The argument of one field; the first one, when it is required, is positional."""
    shown: dict[str, Any] = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    kind, many = _kind(info.annotation)
    bounds = [(bound, getattr(part, bound, None)) for part in info.metadata for bound in BOUNDS]
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    positional = (first and info.is_required()) or bool(shown.get("positional"))
    values = "|".join(map(str, get_args(info.annotation))) if get_origin(info.annotation) is Literal else ""
    word = name.upper() if positional else name.upper().rpartition("_")[2]
    return Argument(
        name=name,
        kind=kind,
        takes=type_name(info.annotation),
        help=info.description or type_name(info.annotation),
        default=list(default) if isinstance(default, tuple) else default,
        required=info.is_required(),
        positional=positional,
        many=many,
        metavar=shown.get("metavar") or values or word,
        group=shown.get("group", ""),
        bounds={bound: value for bound, value in bounds if value is not None},
    )


def _kind(annotation: Any) -> tuple[str, bool]:
    """(kind, may be given more than once) of a type: int | None is an int, tuple[str, ...] is text, several times."""
    if get_origin(annotation) in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return _kind(parts[0]) if len(parts) == 1 else ("text", False)
    if get_origin(annotation) in (tuple, list):
        return _kind(get_args(annotation)[0])[0], True
    return {int: "int", float: "float", bool: "switch"}.get(annotation, "text"), False
