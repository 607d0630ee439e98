"""Answers that keep to a form: any JSON object, a JSON schema, a regular expression (by llguidance).

A `Grammar` is compiled once, outside the engine's thread; every request that uses it gets its own `Matcher`, which
says before each token which ones may come and is told which one came.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gulliver.core.errors import ConfigError, MissingExtra

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as most of it is written: where blanks are free, small models lose themselves in them."""
KEPT = 64
"""Compiled grammars kept for the next request with the same form."""


class _Core(Protocol):
    """What is used of llguidance's LLMatcher."""

    def deep_copy(self) -> _Core: ...
    def is_error(self) -> bool: ...
    def get_error(self) -> str: ...
    def is_stopped(self) -> bool: ...
    def is_accepting(self) -> bool: ...
    def consume_token(self, sampled_token: int) -> bool: ...
    def unsafe_compute_mask_ptr(self, trg_pointer: int, trg_byte_size: int) -> None: ...


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, core: _Core, vocabulary: int) -> None:
        self._core = core
        self._vocabulary = vocabulary
        self._bits = np.zeros((vocabulary + 31) // 32, np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [vocabulary]; end tokens among them where the answer may end."""
        self._core.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocabulary, bitorder="little")
        allowed = bits.view(np.bool_)
        if not allowed.any():
            raise ConfigError("the grammar cannot go on: no token of the vocabulary fits")
        return allowed

    def accept(self, token: int) -> None:
        """Go on by `token`, which must be allowed."""
        self._core.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self._core.is_stopped()

    def _check(self) -> None:
        if self._core.is_error():
            raise ConfigError(f"the grammar cannot go on: {_first_line(self._core.get_error())}")


class Grammar:
    """A compiled form of answers."""

    def __init__(self, core: _Core, vocabulary: int) -> None:
        self._core = core
        self._vocabulary = vocabulary

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        return Matcher(self._core.deep_copy(), self._vocabulary)


class Grammars:
    """Compiles grammars for one tokenizer. Any thread may ask; the first time costs about a second."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: int, end_tokens: Iterable[int]) -> None:
        """`vocabulary`: columns of the logits; `end_tokens`: allowed where an answer may end."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = sorted(end_tokens)
        self._lock = Lock()
        self._core: Any = None
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any] | bool) -> Grammar:
        """JSON values of `schema`. ConfigError when the schema is wrong or uses what is not supported."""
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema is no JSON: {_first_line(str(error))}") from error
        return self._compiled("the JSON schema", text)

    def regex(self, pattern: str) -> Grammar:
        """Texts that match `pattern` as a whole (Rust's regular expressions). ConfigError when it is wrong."""
        return self._compiled("the regular expression", pattern)

    def _compiled(self, what: str, source: str) -> Grammar:
        with self._lock:
            found = self._kept.get((what, source))
            if found is None:
                found = self._kept[what, source] = self._compile(what, source)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((what, source))
            return found

    def _compile(self, what: str, source: str) -> Grammar:
        try:
            import llguidance  # a native library of 20 MB, for those requests alone that ask for a form
        except ImportError as error:
            raise MissingExtra("constrained output", "serve") from error
        if self._core is None:
            ends: Any = self._end_tokens or None
            self._core = llguidance.LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocabulary, eos_token=ends)
        try:
            if what == "the JSON schema":
                layout: Any = LAYOUT
                grammar = llguidance.LLMatcher.grammar_from_json_schema(source, overrides=layout)
            else:
                grammar = llguidance.LLMatcher.grammar_from_regex(source)
        except ValueError as error:
            raise ConfigError(f"{what} cannot be used: {_first_line(str(error))}") from error
        core = llguidance.LLMatcher(self._core, grammar, log_level=0)
        if core.is_error():
            raise ConfigError(f"{what} cannot be used: {_first_line(core.get_error())}")
        compiled = Grammar(core, self._vocabulary)
        compiled.matcher().allowed()  # some mistakes ({"$ref": "#"}) show at the first token only
        return compiled


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no reason is given"
