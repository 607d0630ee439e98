"""The command line, made from the table of steps.

Exit codes: 0 passed, 1 bug, 2 bad input, 3 a gate refused, 4 the budget is infeasible.
Top-level help reads the table only; the module of a step is imported when its command is chosen. Results go to stdout,
progress and errors to stderr; with --json, stdout holds one JSON document and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from gulliver import __version__
from gulliver.cli.commands import COMMANDS, MODEL_HELP, Session, described
from gulliver.core.errors import ConfigError, GulliverError
from gulliver.core.stdout import stdout_into
from gulliver.pipeline import steps
from gulliver.pipeline.steps import Step, did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        options = _parsed(words)
    except GulliverError as failure:
        return _failed(failure, as_json)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        with contextlib.ExitStack() as stack:
            if as_json or not options.streams:
                stack.enter_context(stdout_into(2))
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            document, lines = options.act(options, _session(options, words))
    except GulliverError as failure:
        return _failed(failure, as_json)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's last flush has somewhere to go
        return 0
    except Exception as failure:
        traceback.print_exc()
        if as_json:
            _print_error(failure, 1)
        return 1
    if as_json:
        lines = [json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)]
    if lines:
        print("\n".join(lines))
    return 0


def _session(options: argparse.Namespace, words: list[str]) -> Session:
    from gulliver.core.progress import Progress

    return Session(options.home, options.database, Progress(quiet=options.quiet), shlex.join(["gulliver", *words]))


def _failed(failure: GulliverError, as_json: bool) -> int:
    """One message, never a traceback."""
    print(f"error: {failure}", file=sys.stderr)
    if as_json:
        _print_error(failure, failure.exit_code)
    return failure.exit_code


def _print_error(failure: Exception, code: int) -> None:
    document = {"error": type(failure).__name__, "message": str(failure), "exit_code": code}
    print(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False))


# ---- parsers -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, but wrong input is a ConfigError like every other."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _parsed(words: list[str]) -> argparse.Namespace:
    """The options of a command line. ConfigError names the nearest command or option to one that does not exist."""
    start = 0
    while start < len(words) and words[start].startswith("-"):
        start += 2 if words[start] in ("--home", "--database") else 1
    if start >= len(words):
        words = [word for word in words if word in ("-h", "--help", "--version")]
    words = [*words[start:], *words[:start]]  # what is for everywhere may stand before the command too
    rows = {row.name: row.help for row in steps.STEPS} | {command.name: command.help for command in COMMANDS}
    chosen = words[0] if words and not words[0].startswith("-") else None
    if chosen is not None and chosen not in rows:
        raise ConfigError(f"there is no command {chosen!r}{did_you_mean(chosen, rows)}")
    parser, below = _parser(chosen, rows)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        known = [flag for action in below._actions for flag in action.option_strings] if below else []
        flag = next((word for word in unknown if word.startswith("-")), None)
        near = did_you_mean(flag, known) if flag else f"; see `gulliver {chosen} --help`"
        raise ConfigError(f"gulliver {chosen} does not take {(flag or unknown[0])!r}{near}")
    return options


def _parser(chosen: str | None, rows: dict[str, str]) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """The parser, and that of the chosen command; only this one gets its arguments: that imports its module."""
    parser = _Parser(prog="gulliver", description="Fit a large model into a stated budget, with every claim measured.")
    parser.add_argument("--version", action="version", version=f"gulliver {__version__}")
    commands = parser.add_subparsers(dest="chosen", metavar="COMMAND", required=True)
    below = {
        name: commands.add_parser(name, help=rows[name], description=rows[name], allow_abbrev=False)
        for name in sorted(rows)
    }
    if chosen is not None:
        command = next((command for command in COMMANDS if command.name == chosen), None)
        if command is not None:
            command.arguments(below[chosen])
            below[chosen].set_defaults(act=command.act, streams=command.streams)
        else:
            _step_arguments(below[chosen], steps.find(chosen))
        _common_arguments(below[chosen])
    return parser, below.get(chosen or "")


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("everywhere")
    group.add_argument("--home", metavar="DIR", help="where artifacts and evidence are kept (default ~/.gulliver)")
    group.add_argument("--database", metavar="URL", help="keep evidence and runs there, e.g. postgresql+psycopg://…")
    group.add_argument("--json", action="store_true", help="print one JSON document on stdout, nothing else")
    group.add_argument("--quiet", action="store_true", help="show no progress")


def _step_arguments(parser: argparse.ArgumentParser, row: Step) -> None:
    """The inputs of a step, then one option per field of its Config."""
    from pydantic_core import PydanticUndefined

    config = steps.options_class(row)
    positional = next(iter(row.needs), None)
    first_field = next(iter(config.model_fields), None) if positional is None else None
    if positional is not None:
        parser.add_argument(positional, metavar=positional.upper(), help=_input_help(positional))
    for role in (*row.needs[1:], *row.optional):
        flag = "--data" if role == "dataset" else f"--{role}"
        needed = role in row.needs
        parser.add_argument(flag, dest=role, metavar=role.upper(), required=needed, help=_input_help(role))
    for name, field in config.model_fields.items():
        default = "" if field.default in (None, PydanticUndefined) else f" (default {field.default})"
        about = f"{field.description or steps.type_name(field.annotation)}{default}".replace("%", "%%")
        if name == first_field and field.is_required():
            parser.add_argument(f"config_{name}", metavar=name.upper(), help=about)
            continue
        flag = f"--{name.replace('_', '-')}"
        options: dict[str, Any] = {"dest": f"config_{name}", "default": None, "help": about}
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(flag, metavar=name.upper().rpartition("_")[2], required=field.is_required(), **options)
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    parser.add_argument("--out", metavar="DIR", help="also copy what was made there")
    parser.set_defaults(act=_run_step, streams=False)


def _input_help(role: str) -> str:
    kind = steps.INPUT_KINDS[role]
    if kind == "model":
        return MODEL_HELP
    if kind == "dataset":
        return "a dataset: an artifact id, a folder, text files or catalog:NAME"
    return f"the id of a {role} report"


# ---- the command of a step -------------------------------------------------------------------------------------------


def _run_step(options: argparse.Namespace, session: Session) -> tuple[Any, list[str]]:
    from gulliver.pipeline.call import Call, call
    from gulliver.pipeline.resolve import resolve_inputs

    row = steps.find(options.chosen)
    fields = steps.options_class(row).model_fields
    values = {name: getattr(options, f"config_{name}") for name in fields}
    config = {name: _value(text, fields[name].annotation) for name, text in values.items() if text is not None}
    given = {role: getattr(options, role) for role in (*row.needs, *row.optional)}
    inputs = resolve_inputs(row, given, config, session.store, session.progress)
    log: list[Call] = []
    made = call(
        row.name,
        config,
        inputs,
        store=session.store,
        seed=options.seed,
        progress=session.progress,
        command=session.command,
        log=log,
    )
    return described(made, session, options.out, reused=log[-1].reused)


def _value(text: Any, annotation: Any) -> Any:
    """An option's text as the field's type: text itself, or the JSON it holds, or a list cut at commas."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(text, str):
        return text
    readings: list[Any] = [text]
    with contextlib.suppress(ValueError):
        readings.append(json.loads(text))
    readings.append([_json_or_text(part.strip()) for part in text.split(",")])
    for reading in readings:
        with contextlib.suppress(ValidationError):
            TypeAdapter(annotation).validate_python(reading)
            return reading
    return text


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
