"""The command `ask`."""

from __future__ import annotations

import json
import sys
from typing import Any

from gulliver.cli.options import AskOptions
from gulliver.cli.session import Session


def ask(options: AskOptions, session: Session) -> tuple[Any, list[str]]:
    """One answer of a model of any family. ConfigError or DataError for an input that it does not understand."""
    from gulliver.core.quantities import parse_size
    from gulliver.pipeline.ask import answered, open_answerer
    from gulliver.tasks.answerer import OpenOptions

    opening = OpenOptions(
        threads=options.threads,
        isa=options.isa,
        backend=options.backend,
        slots=1,
        max_ram_bytes=None if options.ram is None else parse_size(options.ram, "--ram"),
    )
    given = _given(options.input)
    with open_answerer(options.model, opening, store=lambda: session.store, progress=session.progress) as answerer:
        response = answered(answerer, given)
        session.progress.print(f"{answerer.name} by {answerer.backend}: {answerer.why}")
        return response.model_dump(), answerer.show(response)


def _given(words: tuple[str, ...]) -> Any:
    """What was written after the model: a JSON object is a request, everything else is the family's to read."""
    if words == ("-",):
        words = (sys.stdin.read(),)
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        try:
            return json.loads(words[0])
        except (ValueError, RecursionError):
            return list(words)  # a prompt may begin with a brace
    return list(words)
