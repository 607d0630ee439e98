"""Words of a command line -> the command and what is given to it. argparse, filled from the records in arguments.py.

The parser checks types and bounds of a command's options; those of a step are text here, which `checked_config` reads
as it reads a recipe's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gulliver import __version__
from gulliver.cli.arguments import BOUNDS, MODEL_HELP, Argument, arguments
from gulliver.cli.commands import COMMANDS, Command
from gulliver.core.errors import ConfigError
from gulliver.pipeline import steps
from gulliver.pipeline.steps import Step, did_you_mean

EVERYWHERE, MAKING = "gulliver.cli.options:Everywhere", "gulliver.cli.options:Making"


@dataclass(frozen=True)
class Parsed:
    """One command line: the row it names, what was given of the row's own options, and of those of every command."""

    row: Command | Step
    given: dict[str, Any]
    everywhere: dict[str, Any]


def parsed(words: Sequence[str]) -> Parsed:
    """The command and its options. ConfigError names the nearest command or option to one that does not exist.

    SystemExit after --help or --version.
    """
    start = 0
    while start < len(words) and words[start].startswith("-"):
        start += 2 if words[start] in ("--home", "--database") else 1
    if start >= len(words):
        _top().parse_args([word for word in words if word in ("-h", "--help", "--version")])
    words = [*words[start:], *words[:start]]  # options of every command may come before it too
    row = _rows().get(words[0])
    if row is None:
        raise ConfigError(f"unknown command {words[0]!r}{did_you_mean(words[0], _rows())}")
    parser = _Parser(prog=f"gulliver {row.name}", description=row.help, allow_abbrev=False)
    _fill_step(parser, row) if isinstance(row, Step) else _fill(parser, arguments(row.options))
    common = arguments(EVERYWHERE)
    _fill(parser, [replace(argument, group="everywhere") for argument in common])
    found, unknown = parser.parse_known_args(words[1:])
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), None)
        known = [flag for action in parser._actions for flag in action.option_strings]
        near = did_you_mean(flag, known) if flag else f"; see `gulliver {row.name} --help`"
        raise ConfigError(f"gulliver {row.name} does not take {(flag or unknown[0])!r}{near}")
    given = vars(found)
    everywhere = {argument.name: given.pop(argument.name, argument.default) for argument in common}
    return Parsed(row, given, everywhere)


def _rows() -> dict[str, Command | Step]:
    return {row.name: row for row in (*steps.STEPS, *COMMANDS)}


def _top() -> argparse.ArgumentParser:
    """The parser of a command line that names no command: the list of all of them."""
    parser = _Parser(prog="gulliver", description="Fit a large model into a stated budget, with every claim measured.")
    parser.add_argument("--version", action="version", version=f"gulliver {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, row in sorted(_rows().items()):
        commands.add_parser(name, help=row.help)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse, but wrong input is a ConfigError like every other."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


# ---- filling a parser ------------------------------------------------------------------------------------------------


def _fill(parser: argparse.ArgumentParser, records: Sequence[Argument], *, as_text: bool = False) -> None:
    """One argument for each record; options that are not given are not in the result."""
    groups: dict[str, Any] = {"": parser}
    for record in records:
        if record.group not in groups:
            groups[record.group] = parser.add_argument_group(record.group)
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": record.about.replace("%", "%%")}
        if record.kind == "switch":
            settings["action"] = argparse.BooleanOptionalAction if as_text else "store_true"
        else:
            settings["metavar"] = record.metavar
            if not as_text:
                settings["type"] = _reader(record)
        if record.many and not as_text:
            settings |= {"nargs": "+"} if record.positional else {"action": "append"}
        if record.positional and not record.required and not record.many:
            settings["nargs"] = "?"
        if not record.positional:
            settings |= {"dest": record.name, "required": record.required}
        groups[record.group].add_argument(record.name if record.positional else record.flag, **settings)


def _reader(record: Argument) -> Callable[[str], Any]:
    """What argparse reads a text with. ConfigError for a number out of bounds."""

    def read(text: str) -> Any:
        value = {"int": int, "float": float}.get(record.kind, str)(text)
        for bound, limit in record.bounds.items():
            if not {"ge": value >= limit, "gt": value > limit, "le": value <= limit, "lt": value < limit}[bound]:
                raise ConfigError(f"{record.flag} is {text}; it must be {BOUNDS[bound]} {limit:g}")
        return value

    read.__name__ = record.kind  # argparse shows it: "invalid int value: 'x'"
    return read


def _fill_step(parser: argparse.ArgumentParser, row: Step) -> None:
    """The inputs of a step by role, then its options, then what every step takes."""
    for role in (*row.needs, *row.optional):
        first = role == next(iter(row.needs), None)
        name = role if first else "--data" if role == "dataset" else f"--{role}"
        settings: dict[str, Any] = {} if first else {"dest": role, "required": role in row.needs}
        if role in row.several:
            settings["nargs"] = "+"
        parser.add_argument(name, metavar=role.upper(), default=argparse.SUPPRESS, help=_input_help(role), **settings)
    own = arguments(row.options)
    _fill(parser, [replace(record, positional=record.positional and not row.needs) for record in own], as_text=True)
    _fill(parser, arguments(MAKING))


def _input_help(role: str) -> str:
    kind = steps.INPUT_KINDS[role]
    if kind == "model":
        return MODEL_HELP
    if kind == "dataset":
        return "a dataset: an artifact id, a folder, text files or catalog:NAME"
    return f"the id of a {role} report"
