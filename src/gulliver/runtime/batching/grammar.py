"""Answers of a given form: any JSON object, or JSON that meets a schema (by llguidance).

A `Grammar` is compiled once, outside the engine's thread; every request gets its own `Matcher`, which says which tokens
may come next and takes the token that was drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gulliver.core.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher

LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as most of it is written: small models tend to emit endless whitespace where it is allowed."""
STUCK = "the grammar allows no next token"
KEPT = 64  # compiled grammars kept for the next request with the same form


class Matcher:
    """The state of one answer in its grammar."""

    def __init__(self, core: LLMatcher, vocabulary: int) -> None:
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
            raise ConfigError(f"{STUCK}: none of the vocabulary fits")
        return allowed

    def accept(self, token: int) -> None:
        """Continue with `token`, which must be allowed."""
        self._core.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the answer is complete: no token can follow."""
        return self._core.is_stopped()

    def _check(self) -> None:
        if self._core.is_error():
            raise ConfigError(f"{STUCK}: {_first_line(self._core.get_error())}")


@dataclass(frozen=True)
class Grammar:
    """A compiled form of answers."""

    core: LLMatcher
    vocabulary: int

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        return Matcher(self.core.deep_copy(), self.vocabulary)


class Grammars:
    """Compiles grammars for one tokenizer. Any thread may ask; the first time costs about a second."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: int, end_tokens: Iterable[int]) -> None:
        """`vocabulary`: columns of the logits; `end_tokens`: allowed where an answer may end."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = sorted(end_tokens)
        self._lock = Lock()
        self._core: Any = None
        self._kept: dict[
            str, Grammar
        ] = {}  # by schema, the least recently used first (no lru_cache: it would be a cycle)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any] | bool) -> Grammar:
        """JSON values of `schema`. ConfigError when the schema is wrong or uses what is not supported."""
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema is not JSON: {_first_line(str(error))}") from error
        with self._lock:
            self._kept[text] = found = self._kept.pop(text, None) or self._compile(text)
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
            return found

    def _compile(self, schema: str) -> Grammar:
        import llguidance  # a native library of 20 MB, for those requests alone that ask for a form

        if self._core is None:
            ends: Any = self._end_tokens or None
            self._core = llguidance.LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocabulary, eos_token=ends)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)
        except ValueError as error:
            raise ConfigError(f"the JSON schema is not supported: {_first_line(str(error))}") from error
        core = llguidance.LLMatcher(self._core, grammar, log_level=0)
        if core.is_error():
            raise ConfigError(f"the JSON schema is not supported: {_first_line(core.get_error())}")
        compiled = Grammar(core, self._vocabulary)
        compiled.matcher().allowed()  # some mistakes ({"$ref": "#"}) show at the first token only
        return compiled


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no reason given"
