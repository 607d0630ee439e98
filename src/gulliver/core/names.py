"""Names in tables: what one stands for, and what to say of one that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any


def named(target: str) -> Any:
    """What "module:attribute" names, imported now."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when none is like it."""
    import difflib

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
