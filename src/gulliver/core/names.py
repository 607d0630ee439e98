"""Messages for a name that is not in a table: what was wrong, what is nearest, what there is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when none is like it."""
    found = difflib.get_close_matches(name.lower(), list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'bits'?", or every choice."""
    known = sorted(choices)
    near = nearest(str(name), known)
    if near is not None:
        return f"; did you mean {near!r}?"
    return f"; there are: {', '.join(known)}" if known else ""


def unknown(what: str, name: object, choices: Iterable[str]) -> str:
    """One line for an error: "unknown metric 'perplexty'; did you mean 'perplexity'?", or every choice."""
    return f"unknown {what} {name!r}{did_you_mean(name, choices)}"
