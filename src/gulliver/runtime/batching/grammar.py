"""Answers of a given form: any JSON object, or JSON that meets a schema (by llguidance).

A `Grammar` is compiled once, outside the engine's thread; every request gets its own `Matcher`, which says which tokens
may come next and takes the token that was drawn.

A schema comes with a request, so a stranger wrote it. What it may take is bounded: llguidance limits the work of
compiling it and of every token; a step of numbers, which it does not limit, is limited here; and the memory of all
grammars together, by an estimate that is high for most: a schema of two megabytes takes 35 to 400, and the states that
matchers visit are kept with the grammar, up to 18 KB a token for patterns that are made for it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gulliver.core.errors import ConfigError, first_line
from gulliver.runtime.batching.refusals import GrammarsFull

if TYPE_CHECKING:
    from llguidance import LLMatcher

LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as most of it is written: small models tend to emit endless whitespace where it is allowed."""
STUCK = "the grammar allows no next token"
KEPT = 64  # compiled grammars kept for the next request with the same form
KEPT_BYTES = 32 * 2**20  # of these, by the estimate
IN_USE_BYTES = 512 * 2**20  # of all that requests hold, by the estimate; one alone is always let in
BYTES_PER_CHARACTER = 128  # of a schema
BYTES_PER_TOKEN = 20_000  # of an answer
RETRY_SECONDS = 5.0
MOST_STATES = 100_000  # of a grammar's automaton, about 1 KB each
LARGEST_STEP = 100_000  # "multipleOf" without its point: the automaton has a state for every remainder


class Matcher:
    """The state of one answer in its grammar."""

    def __init__(self, grammar: Grammar, vocabulary: int) -> None:
        self._core = grammar.core.deep_copy()
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._bits = np.zeros((vocabulary + 31) // 32, np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [vocabulary]; end tokens among them where the answer may end."""
        self._grammar.tokens += 1
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
            raise ConfigError(f"{STUCK}: {first_line(self._core.get_error())}")


@dataclass(eq=False)
class Grammar:
    """A compiled form of answers. `characters`: of its schema; `tokens`: of the answers that it formed so far."""

    core: LLMatcher
    vocabulary: int
    characters: int = 0
    tokens: int = 0

    @property
    def size_bytes(self) -> int:
        """An estimate of what it takes."""
        return self.characters * BYTES_PER_CHARACTER + self.tokens * BYTES_PER_TOKEN

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        return Matcher(self, self.vocabulary)


class Grammars:
    """Compiles grammars for one tokenizer. Any thread may ask; the first time costs about a second."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: int, end_tokens: Iterable[int]) -> None:
        """`vocabulary`: columns of the logits; `end_tokens`: allowed where an answer may end."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = sorted(end_tokens)
        self._lock = Lock()
        self._core: Any = None
        self._kept: dict[str, Grammar] = {}  # by schema, the least recently used first
        self._in_use: WeakSet[Grammar] = WeakSet()  # those that are kept, and those that requests hold

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any] | bool) -> Grammar:
        """JSON values of `schema`.

        ConfigError when the schema is wrong, too large or uses what is not supported; GrammarsFull when the grammars of
        other requests take too much memory.
        """
        try:
            text = json.dumps(schema, allow_nan=False)
            _check_steps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema is not JSON: {first_line(error)}") from error
        with self._lock:
            found = self._kept.pop(text, None)
            if found is None:
                self._make_room(len(text) * BYTES_PER_CHARACTER)
                try:
                    found = self._compile(text)
                except (ConfigError, KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:  # what the library's own language calls a panic is no Exception
                    raise ConfigError(f"the JSON schema is not supported: {first_line(error)}") from error
                self._in_use.add(found)
            self._kept[text] = found
            size = sum(grammar.size_bytes for grammar in self._kept.values())
            while self._kept and (size > KEPT_BYTES or len(self._kept) > KEPT):
                size -= self._kept.pop(next(iter(self._kept))).size_bytes
            return found

    def _make_room(self, size_bytes: int) -> None:
        """GrammarsFull when a grammar of that size does not fit beside those in use."""
        for sweep in (False, True):
            if sweep:
                gc.collect()  # requests that ended may not be gone yet
            used = sum(grammar.size_bytes for grammar in list(self._in_use))
            if not used or used + size_bytes <= IN_USE_BYTES:
                return
        raise GrammarsFull(len(self._in_use), RETRY_SECONDS)

    def _compile(self, schema: str) -> Grammar:
        import llguidance  # a native library of 20 MB, for those requests alone that ask for a form

        if self._core is None:
            ends: Any = self._end_tokens or None
            self._core = llguidance.LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocabulary, eos_token=ends)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)
        except ValueError as error:
            raise ConfigError(f"the JSON schema is not supported: {first_line(error)}") from error
        limits = llguidance.LLParserLimits(max_lexer_states=MOST_STATES)
        core = llguidance.LLMatcher(self._core, grammar, log_level=0, limits=limits)
        if core.is_error():
            raise ConfigError(f"the JSON schema is not supported: {first_line(core.get_error())}")
        compiled = Grammar(core, self._vocabulary, len(schema))
        compiled.matcher().allowed()  # some mistakes ({"$ref": "#"}) show at the first token only
        return compiled


def _check_steps(schema: Any) -> None:
    """ConfigError for a "multipleOf" with too many remainders; RecursionError for a schema that is nested too deep."""
    if isinstance(schema, dict):
        step = schema.get("multipleOf")
        if type(step) in (int, float):
            point = Decimal(repr(step)).as_tuple().exponent
            remainders = abs(Decimal(repr(step))) * (10**-point if isinstance(point, int) and point < 0 else 1)
            if remainders > LARGEST_STEP:
                raise ConfigError(f"the JSON schema is not supported: multipleOf {step} has too many remainders")
    if isinstance(schema, dict | list):
        for value in schema.values() if isinstance(schema, dict) else schema:
            _check_steps(value)
