"""Fingerprints find what two texts share, however it is cut, and nothing that is short."""

from __future__ import annotations

from gulliver.core.overlap import excerpt, fingerprint, fingerprints, first_overlap, shared_phrases
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


def test_the_share_of_phrases_is_counted_in_characters():
    assert shared_phrases(["abcd", "ab", "ab", "xy"], ["ab", "cd", "ab"]) == (0.4, "ab")
    assert shared_phrases(["abcd"], []) == (0.0, "")
    assert shared_phrases([], ["a"]) == (0.0, "")


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
