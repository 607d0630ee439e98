"""A conversation on the terminal: the model's chat template, a history, settings that can be changed on the way."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from gulliver.core.errors import ConfigError, GulliverError
from gulliver.core.names import unknown
from gulliver.pipeline.generate import OpenModel
from gulliver.runtime.sampling import Sampling

HELP = """Write a message and press Enter. Ctrl-C stops an answer; Ctrl-D leaves.
/new              forget the conversation
/system TEXT      set the system message and begin anew; without TEXT there is none
/set              show the settings
/set NAME VALUE   change one: /set temperature 0.7, /set max_tokens 200, /set seed none
/help             show this"""
ORDERS = ("new", "system", "set", "help")
SETTINGS = ("max_tokens", *(field.name for field in fields(Sampling) if field.name != "logit_bias"))


class Chat:
    """One conversation; what is said about it goes to `tell`.

    `messages` is the conversation so far, the system message first where there is one; an answer that was stopped
    is kept as far as it came.
    """

    def __init__(
        self,
        model: OpenModel,
        sampling: Sampling,
        *,
        max_tokens: int | None,
        system: str | None,
        tell: Callable[[str], object],
    ) -> None:
        self._model, self._sampling, self._max_tokens, self._tell = model, sampling, max_tokens, tell
        self._system = system
        self.messages: list[dict[str, str]] = []
        self._begin()

    def run(self, write: Callable[[str], object]) -> None:
        """Read lines of standard input until it ends; write an answer to each, or do what a line with a slash says."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - `input` then edits lines and remembers them
            self._tell(f"{self._model.told()}\n/help says what can be done")
        for line in _lines():
            try:
                if line.startswith("/"):
                    self._order(line)
                elif line.strip():
                    self._say(line, write)
            except GulliverError as failure:
                self._tell(f"error: {failure}")

    def _begin(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def _say(self, text: str, write: Callable[[str], object]) -> None:
        parts: list[str] = []

        def both(part: str) -> None:
            parts.append(part)
            write(part)

        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self._model.tokens(messages)
        if len(tokens) >= self._model.engine.context:
            told = f"the conversation has {len(tokens)} tokens, the model's context {self._model.engine.context}"
            raise ConfigError(f"{told}; begin anew with /new")
        request = self._model.request(tokens, sampling=self._sampling, max_tokens=self._max_tokens)
        try:
            answer = self._model.answer(request, both)
            note = self._model.told(answer)
        except KeyboardInterrupt:
            note = "stopped"
        self.messages = [*messages, {"role": "assistant", "content": "".join(parts)}]
        write("\n")
        self._tell(note)

    def _order(self, line: str) -> None:
        word, _, rest = line[1:].partition(" ")
        if word not in ORDERS:
            raise ConfigError(f"{unknown('order', '/' + word, ['/' + order for order in ORDERS])} /help explains them")
        if word == "help":
            self._tell(HELP)
        elif word == "set":
            self._set(*rest.strip().partition(" ")[::2])
        else:
            with_message = ""
            if word == "system":
                self._system = rest.strip() or None
                with_message = " with this system message" if self._system else " without one"
            self._begin()
            self._tell(f"a new conversation{with_message}")

    def _set(self, name: str, text: str) -> None:
        if name and name not in SETTINGS:
            raise ConfigError(unknown("setting", name, SETTINGS))
        if name == "max_tokens":
            self._max_tokens = _number(name, text.strip())
        elif name:
            self._sampling = replace(self._sampling, **{name: _number(name, text.strip())})
        values = {"max_tokens": self._max_tokens, **{name: getattr(self._sampling, name) for name in SETTINGS[1:]}}
        self._tell(", ".join(f"{name} {'none' if value is None else value}" for name, value in values.items()))


def _lines() -> Any:
    """Lines of standard input; at a terminal with an invitation, and Ctrl-C there only forgets the line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("  (Ctrl-D leaves)", file=sys.stderr)


def _number(name: str, text: str) -> Any:
    """A setting's value; whole numbers where they must be, None for "none" where that means something."""
    whole = name in ("max_tokens", "top_k", "seed")
    if text == "none" and name in ("max_tokens", "seed"):
        return None
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if name == "max_tokens" and type(value) is int and value < 1:
            raise ConfigError(f"max_tokens is {text}; it must be at least 1, or none for what the context holds")
        if type(value) is int or (type(value) is float and not whole):
            return value
    raise ConfigError(f"{name} is {text!r}; write a {'whole ' if whole else ''}number, for example /set {name} 1")
