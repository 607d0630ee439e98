"""Fingerprints find what two texts share, however it is cut, and nothing that is short."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from language_samples import text

from gulliver.core.calibration import SeenRow
from gulliver.core.overlap import (
    FULL,
    KEPT,
    KEPT_WHOLE,
    MAX_SHARED,
    RUN,
    excerpt,
    fingerprint,
    fingerprints,
    first_overlap,
    gram_hashes,
    letters,
    remember,
    shared_lines,
    shared_runs,
)
from gulliver.tasks import get_task
from gulliver.tasks.text.files import MIN_CHARACTERS, paragraphs, phrases

LONG = "the giant measures every island " * 8
OTHER = "a sailor mends the long rope of " * 8


def rows(*texts):
    """The units of examples that hold these texts."""
    return [unit for text in texts for unit in get_task("language").units({"text": text, "source": "x"})]


def test_paragraphs_and_their_long_lines_are_units():
    assert len(LONG.strip()) >= MIN_CHARACTERS
    text = f"{LONG}\nshort\n \n{OTHER}\n\nshort again\n"
    assert list(paragraphs(text)) == [f"{LONG}\nshort", LONG.strip(), OTHER.strip()]
    assert list(paragraphs("x" * (MIN_CHARACTERS - 1))) == []
    assert list(paragraphs("")) == []


def test_a_shared_passage_is_found_whatever_surrounds_it():
    known = fingerprints(rows(f"Chapter 1\n\n  {LONG}\n\nend"))
    assert first_overlap(rows(OTHER, f"before\n{LONG}\nafter"), known) == LONG.strip()
    assert first_overlap(rows(OTHER, LONG[:150]), known) is None
    assert first_overlap(rows(LONG.replace("giant", "queen")), known) is None


def test_phrases_are_sentences_of_lines_whatever_their_spaces_and_case():
    text = (
        'He said: "Go  now." So\twe WENT!\r\n\r\n  Yes. \u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\uff39\uff45\uff53\n'
    )
    assert list(phrases(text)) == [
        'he said: "go now.',
        "so we went!",
        "yes.",
        "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002",
        "yes",
    ]
    assert list(phrases(" \n\t\n")) == []


def test_the_share_of_lines_is_counted_in_letters():
    assert shared_lines(["abcd", "a.b", "ab", "xy"], remember(["ab", "cd", "a b"])) == (0.4, "ab")
    assert shared_lines(["abcd"], remember([])) == (0.0, "")
    assert shared_lines([], remember(["a"])) == (0.0, "")


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(1, 40))
def test_runs_have_equal_hashes_where_they_are_equal(codes, length):
    """Against a dictionary of the runs themselves."""
    hashes = gram_hashes(np.array(codes, np.uint32), length)
    runs = [tuple(codes[at : at + length]) for at in range(len(codes) - length + 1)]
    assert len(hashes) == len(runs) and len(set(hashes.tolist())) == len(set(runs))
    assert len(set(zip(runs, hashes.tolist(), strict=True))) == len(set(runs))
    assert all(value < 2**63 for value in hashes.tolist())


WORDS = [f"{start}{middle}{end}" for start in "blorstamivedu" for middle in ("ea", "on", "ick") for end in "ntrsd"]


def prose(count, seed):
    """A text of `count` sentences of words that follow each other by chance."""
    choose = random.Random(seed)
    rows = [" ".join(choose.choices(WORDS, k=choose.randrange(5, 18))).capitalize() + "." for _ in range(count)]
    return "\n\n".join(" ".join(rows[start : start + 4]) for start in range(0, count, 4))


def other_words(text, every=0):
    """One word in ten, each tenth or drawn, is another."""
    choose = random.Random(5)
    words = text.split(" ")
    return " ".join("zebra" if (at % 10 == 9 if every else choose.random() < 0.1) else w for at, w in enumerate(words))


CHANGED = {
    "same": lambda text: text,
    "upper case": str.upper,
    "blanks doubled": lambda text: text.replace(" ", "  "),
    "one line": lambda text: " ".join(text.split()),
    "wrapped": lambda text: "\n".join(" ".join(text.split())[at : at + 80] for at in range(0, len(text), 80)),
    "quoted": lambda text: "\n".join(f"> {line}" for line in text.splitlines()),
    "listed": lambda text: "".join(f"- **{line}**\n" for line in text.replace(". ", ".\n").splitlines()),
    "curly quotes": lambda text: text.replace(". ", ".\u201d \u201c"),
    "full width": lambda text: text.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)}),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "no blanks": lambda text: "".join(text.split()),
    "shuffled lines": lambda text: "\n".join(sorted(text.replace(". ", ".\n").splitlines())),
    "each tenth word": lambda text: other_words(text, 10),
    "a tenth of the words": other_words,
    "without marks": lambda text: text.replace(".", ""),
}


def seen_in(text, seen):
    """Whether a text is refused as one that was seen."""
    share, least = shared_runs(remember(phrases(text), KEPT_WHOLE), seen)
    assert 0 <= least <= share <= 1
    return shared_lines(phrases(text), seen).share > MAX_SHARED or seen.is_text_of(share, least)


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("script", ["words", "signs"])
def test_the_same_text_is_found_however_it_is_written(change, script):
    train, fresh = prose(900, 1), prose(300, 2)
    if script == "signs":  # of a script without blanks; a word is a sign
        table = {word: chr(0x4E00 + 7 * at) for at, word in enumerate(WORDS)}
        train, fresh = (
            "".join("\n" if not word else table[word.lower().rstrip(".")] + "。" * word.endswith(".")
                    for line in text.split("\n") for word in [*line.split(" ")])
            for text in (train, fresh)
        )  # fmt: skip
        if change == "each tenth word":
            change = "same"  # there is one word
    seen = remember(phrases(train))
    part = train[len(train) // 3 : len(train) // 2]
    assert seen_in(CHANGED[change](part), seen)
    assert not seen_in(CHANGED[change](fresh), seen)
    half = f"{part}\n\n{fresh[: len(part)]}"
    assert seen_in(CHANGED[change](half), seen) or change in ("each tenth word", "a tenth of the words")


def test_text_that_repeats_itself_is_no_other_text():
    line = "the same words come again and again without an end and nobody knows why they do "
    assert seen_in(line * 50, remember([line * 400]))
    rows = [f"row number {at} of a table that somebody wrote " for at in range(20)]
    table = "".join(random.Random(1).choices(rows, k=4000))
    assert seen_in(table[:20_000], remember([table[20_000:]]))


def test_a_grammar_shares_with_itself_what_it_shares_with_its_held_out_part():
    whole = text(3000, 1)
    cut = int(0.9 * len(whole))
    seen = remember(phrases(whole[:cut]))
    assert seen.run_limit > 0.5 and not seen_in(whole[cut:], seen)
    assert seen_in(whole[:cut][-len(whole) // 10 :].upper(), seen)


def test_what_is_remembered_is_bounded_and_finds_the_same():
    long, most = prose(1500, 3), 2**12
    seen, whole = remember(phrases(long), most), remember(phrases(long))
    assert len(seen.runs.hashes) == most < len(whole.runs.hashes) <= KEPT or whole.runs.bound < FULL
    assert seen.runs.hashes.tolist() == whole.runs.hashes[:most].tolist()
    part = other_words(long[:30_000], 10)
    ours = remember(phrases(part))
    assert shared_runs(ours, seen)[0] == pytest.approx(shared_runs(ours, whole)[0], abs=0.06)
    assert seen_in(part, seen) and not seen_in(prose(600, 4), seen)
    row = SeenRow.of(seen)
    kept = SeenRow.model_validate_json(row.model_dump_json()).seen()
    assert kept.runs.hashes.tolist() == seen.runs.hashes.tolist() and kept.own == seen.own
    assert len(row.model_dump_json()) < 2 * most * 8 * 4 / 3 + 200


def test_letters_are_what_is_left_of_a_phrase():
    assert letters('he said: "go-now" 3.5 \u4eca\u5929!') == "hesaidgonow35\u4eca\u5929"
    assert len(gram_hashes(np.zeros(RUN - 1, np.uint32), RUN)) == 0


def test_fingerprints_are_stable():
    assert fingerprint("a") == "ca978112ca1bbdca"
    assert fingerprints(rows(LONG, LONG)) == [fingerprint(LONG.strip())]


def test_examples_without_text_are_compared_whole():
    rows = [{"image": [0.0, 0.5], "label": 1}, {"image": [0.5, 0.0], "label": 1}]
    images = [unit for row in rows for unit in get_task("vision").units(row)]
    known = fingerprints(get_task("vision").units({**rows[0], "split": "train", "source": "a"}))
    assert first_overlap([images[1]], known) is None
    assert first_overlap(images, known) is not None


def test_an_excerpt_is_one_short_line():
    assert excerpt("a\nb  c") == "a b c"
    assert len(excerpt(LONG)) == 80 and excerpt(LONG).endswith("…")
