"""The command line: one command, its document or lines on stdout, its exit code.

Exit codes: 0 passed, 1 bug, 2 bad input, 3 a gate refused, 4 the budget is infeasible.
Help reads tables and parsers.json only; a command's module is imported when it is to act. Results go to stdout,
progress and errors to stderr; with --json, stdout holds one JSON document and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from gulliver.cli.commands import Command
from gulliver.cli.parser import Parsed, parsed
from gulliver.core.errors import GulliverError, StorageError
from gulliver.core.stdout import abandon_stdout, ready_streams, stdout_into
from gulliver.core.store.disk import storage_errors
from gulliver.core.store.files import named_path
from gulliver.pipeline.steps import INPUT_KINDS, Step
from gulliver.tasks import foreign_files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    ready_streams()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what there is to know, our errors and notes say
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words, "--json" in words)
        sys.stdout.flush()  # now, and not when Python ends, where a failure has no words
        return code
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        abandon_stdout()
        return 0
    except StorageError as failure:  # standard output itself
        abandon_stdout()
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code


def _run(words: list[str], as_json: bool) -> int:
    try:
        line = parsed(words)
    except GulliverError as failure:
        return _failed(failure, as_json)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        with contextlib.ExitStack() as stack:
            if as_json or not getattr(line.row, "streams", False):
                stack.enter_context(stdout_into(2))
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            home = line.everywhere["home"] or os.path.expanduser("~/.gulliver")
            stack.enter_context(storage_errors(home, line.given.get("out")))
            document, lines = _act(line, words)
    except BrokenPipeError:
        raise
    except Exception as failure:
        return _failed(failure, as_json)
    if as_json:
        lines = [_json(document)]
    if lines:
        print("\n".join(lines), flush=True)
    return 0


def _act(line: Parsed, words: list[str]) -> tuple[Any, list[str]]:
    from gulliver.cli.session import Session
    from gulliver.core.progress import Progress

    home, database, as_json, quiet = (line.everywhere[name] for name in ("home", "database", "json_", "quiet"))
    session = Session(home, database, Progress(quiet=quiet), shlex.join(["gulliver", *words]), as_json)
    _check_models(line)
    if isinstance(line.row, Step):
        from gulliver.cli.make import run_step

        return run_step(line.row, line.given, session)
    return line.row.act(line.given, session)


def _check_models(line: Parsed) -> None:
    """Refuse a model that does not exist or cannot be read before torch, pydantic and a database are imported.

    Commands that answer at once look at their model first of all themselves.
    """
    from gulliver.pipeline.spec import check_spec

    if isinstance(line.row, Command) and line.row.cold:
        return
    for name, value in line.given.items():
        if isinstance(line.row, Step) and name in line.row.reads:
            foreign_files(named_path(value))
        elif INPUT_KINDS.get(name) == "model":
            for spec in [value] if isinstance(value, str) else value:
                named_so = name == "models" and isinstance(line.row, Command)  # `serve` takes NAME=MODEL
                check_spec(spec.partition("=")[2] or spec if named_so else spec)


def _failed(failure: Exception, as_json: bool) -> int:
    """The exit code; one message for an expected error, a traceback for a bug alone."""
    code = failure.exit_code if isinstance(failure, GulliverError) else 1
    if isinstance(failure, GulliverError):
        print(f"error: {failure}", file=sys.stderr)
    else:
        traceback.print_exception(failure)
    if as_json:
        print(_json({"error": type(failure).__name__, "message": str(failure), "exit_code": code}))
    return code


def _json(document: Any) -> str:
    """One JSON document; in ASCII where the terminal's encoding is not UTF-8."""
    plain = (getattr(sys.stdout, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=plain)
