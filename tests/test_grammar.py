"""Constrained answers: whatever is drawn among the allowed tokens is an answer of the asked form."""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_samples import END, VOCABULARY, Collected, FakeDecoder, answer, ids, read_text

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.engine import Engine, Request, Sampling
from gulliver.runtime.batching.grammar import BYTES_PER_TOKEN, KEPT, KEPT_BYTES, Grammar, Grammars
from gulliver.runtime.batching.refusals import QueueFull
from gulliver.runtime.text.tokenizer import Text

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["big", "small"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return read_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def grammars(text: Text) -> Grammars:
    return Grammars(text.tokenizer, VOCABULARY, text.end_tokens)


def of_pattern(grammars: Grammars, pattern: str) -> Grammar:
    """JSON strings that match a pattern."""
    return grammars.json_schema({"type": "string", "pattern": f"^({pattern})$"})


def drawn(grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """An answer of random allowed tokens; None when it has not ended after `most`."""
    random, matcher, said = np.random.default_rng(seed), grammar.matcher(), []
    for _ in range(most):
        if matcher.finished:
            break
        token = int(random.choice(np.flatnonzero(matcher.allowed())))
        if token == END:
            break
        said.append(token)
        matcher.accept(token)
    else:
        return None
    return bytes(said).decode()


def test_answers_of_a_schema(grammars: Grammars) -> None:
    grammar, seen = grammars.json_schema(PERSON), set()
    for seed in range(30):
        said = drawn(grammar, seed)
        assert said is not None
        person = json.loads(said)
        assert list(person) == ["name", "age", "tags"]
        assert isinstance(person["name"], str) and len(person["name"]) <= 8
        assert type(person["age"]) is int and 0 <= person["age"] <= 150
        assert len(person["tags"]) <= 2 and set(person["tags"]) <= {"big", "small"}
        seen.add(said)
    assert len(seen) > 20


def test_any_object_on_one_line(grammars: Grammars) -> None:
    grammar = grammars.json_object()
    said = [found for seed in range(60) if (found := drawn(grammar, seed)) is not None]
    assert len(said) > 10
    for found in said:
        assert isinstance(json.loads(found), dict)
        assert not re.search(r"\s\s|\n", re.sub(r'"([^"\\]|\\.)*"', "", found))


def test_texts_of_a_pattern(grammars: Grammars) -> None:
    grammar = of_pattern(grammars, r"(ja|nein), [0-9]{2}°")
    for seed in range(20):
        assert re.fullmatch(r"(ja|nein), [0-9]{2}°", json.loads(drawn(grammar, seed) or ""))


def test_an_end_is_allowed_only_where_the_answer_may_end(grammars: Grammars) -> None:
    matcher = grammars.json_schema({"type": "integer"}).matcher()
    assert not matcher.allowed()[END]
    matcher.accept(ord("1"))
    assert matcher.allowed()[END] and not matcher.finished
    with pytest.raises(ConfigError, match="grammar"):
        matcher.accept(ord("b"))


def test_matchers_of_one_grammar_do_not_know_each_other(grammars: Grammars) -> None:
    grammar = of_pattern(grammars, "ab")
    first, second = grammar.matcher(), grammar.matcher()
    for matcher in (first, second):
        matcher.accept(ord('"'))
    first.accept(ord("a"))
    assert np.flatnonzero(first.allowed()).tolist() == [ord("b")]
    assert np.flatnonzero(second.allowed()).tolist() == [ord("a")]


def test_a_grammar_is_compiled_once(grammars: Grammars) -> None:
    assert grammars.json_schema(PERSON) is grammars.json_schema(dict(PERSON))
    assert of_pattern(grammars, "x") is not of_pattern(grammars, "y")


def test_the_least_recently_used_grammar_is_dropped(grammars: Grammars) -> None:
    first, second = of_pattern(grammars, "a"), of_pattern(grammars, "b")
    for number in range(KEPT - 2):
        of_pattern(grammars, f"c{number}")
    assert of_pattern(grammars, "a") is first
    of_pattern(grammars, "d")
    assert of_pattern(grammars, "a") is first and of_pattern(grammars, "b") is not second


def test_what_is_no_longer_used_is_freed_at_once(text: Text) -> None:
    gc.disable()
    try:
        grammars = Grammars(text.tokenizer, VOCABULARY, text.end_tokens)
        grammars.json_object()
        freed = weakref.ref(grammars)
        del grammars
        assert freed() is None, "a tokenizer in a cycle stays in memory until the next collection"
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "form",
    [
        {"type": "nonsense"},
        {"type": "object", "properties": 3},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "((("},
        {"type": "string", "pattern": "(?=x)"},
        False,
        {"minimum": float("nan")},
        pytest.param({"x": object()}, id="no-json"),
    ],
    ids=str,
)
def test_forms_that_cannot_be_used_are_refused_with_the_reason(form: Any, grammars: Grammars) -> None:
    with pytest.raises(ConfigError, match="JSON schema"):
        grammars.json_schema(form)


def test_an_engine_keeps_to_a_schema(text: Text) -> None:
    engine = Engine(FakeDecoder(), text)
    grammar = engine.grammars.json_schema(PERSON)
    asked = [Request((seed,), None, Sampling(seed=seed, temperature=2.0), grammar=grammar) for seed in range(4)]
    for pieces in engine.complete(asked):
        assert pieces[-1].finish == "stop"
        assert json.loads(answer(pieces)).keys() == PERSON["properties"].keys()
    cut = engine.complete([Request((1,), 5, Sampling(seed=1), grammar=grammar)])[0]
    assert cut[-1].finish == "length" and len(ids(cut)) == 5
    engine.close()


def test_a_model_with_more_logits_than_tokens(tmp_path: Path) -> None:
    text = read_text(tmp_path)
    matcher = Grammars(text.tokenizer, VOCABULARY + 63, text.end_tokens).json_schema({"const": "a"}).matcher()
    assert matcher.allowed().shape == (VOCABULARY + 63,)
    assert np.flatnonzero(matcher.allowed()).tolist() == [ord('"')]


@pytest.mark.parametrize(
    "error", [ConfigError("the grammar allows no next token: too complex"), BaseException("panic")]
)
def test_a_request_whose_grammar_fails_ends_alone(error: BaseException, text: Text) -> None:
    """A library in Rust that panics raises past Exception."""
    engine = Engine(FakeDecoder(), text)

    class Broken:
        def matcher(self) -> Any:
            return self

        finished = False

        def allowed(self) -> Any:
            raise error

    bad, good = Collected(), Collected()
    engine.submit(Request((1,), 5, grammar=Broken()), bad)  # type: ignore[arg-type]
    engine.submit(Request((2,), 5), good)
    assert bad.wait()[-1].finish == f"error: {error}"
    assert good.wait()[-1].finish == "length"
    engine.close()


def test_a_schema_that_only_refers_to_itself_is_refused_when_it_is_compiled(grammars: Grammars) -> None:
    with pytest.raises(ConfigError, match="grammar allows no next token"):
        grammars.json_schema({"$ref": "#"})


def test_what_is_kept_is_bounded_in_bytes(text: Text) -> None:
    grammars = Grammars(text.tokenizer, VOCABULARY, text.end_tokens)
    large = grammars.json_schema({"enum": [f"{number:060}" for number in range(5000)]})
    assert large.size_bytes > KEPT_BYTES and not grammars._kept
    small = grammars.json_object()
    assert grammars.json_object() is small
    small.tokens = KEPT_BYTES // BYTES_PER_TOKEN + 1  # what its answers visited is kept with it
    again = grammars.json_object()
    assert grammars.json_object() is not again and drawn(again, 1) is not None


def test_grammars_under_way_are_bounded_in_bytes(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gulliver.runtime.batching.grammar.IN_USE_BYTES", 20_000)
    grammars = Grammars(text.tokenizer, VOCABULARY, text.end_tokens)
    held = grammars.json_schema({"enum": [f"{number:03}" for number in range(20)]})
    with pytest.raises(QueueFull):
        grammars.json_schema({"const": "a" * 150})
    grammars._kept.clear()
    del held
    assert grammars.json_schema({"const": "a" * 150}) is not None


@pytest.mark.parametrize(
    ("step", "fits"),
    [(0.01, True), (5, True), (1e-6, True), (86400, True), (999_983, False), (1e22, False)],
)
def test_steps_of_numbers_are_bounded(grammars: Grammars, step: float, fits: bool) -> None:
    if fits:
        assert grammars.json_schema({"type": "array", "items": {"type": "number", "multipleOf": step}}) is not None
        return
    with pytest.raises(ConfigError, match=r"multipleOf|not JSON"):
        grammars.json_schema({"type": "array", "items": {"type": "integer", "multipleOf": step}})


def test_a_panic_of_the_library_is_one_line(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(text.tokenizer, VOCABULARY, text.end_tokens)

    def panic(schema: str) -> None:
        raise BaseException("index out of bounds\nstack")

    monkeypatch.setattr(grammars, "_compile", panic)
    with pytest.raises(ConfigError, match=r"not supported: index out of bounds$"):
        grammars.json_object()
