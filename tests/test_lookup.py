"""Prompt lookup: which drafts are made, and when none are."""

from __future__ import annotations

import random

from gulliver.runtime.batching.prompt_lookup import Lookup


def test_the_latest_continuation_of_the_last_three_tokens_is_drafted() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 8, 9, 1, 2, 3]
    assert Lookup().draft(tokens, 3) == [6, 7, 8]
    assert Lookup().draft(tokens, 1) == [6]


def test_two_tokens_are_enough_when_three_are_not_found() -> None:
    assert Lookup().draft([8, 2, 3, 4, 5, 9, 2, 3], 2) == [4, 5]
    assert Lookup().draft([8, 2, 3, 4, 5, 9, 7, 3], 2) == []


def test_what_repeats_is_taken_to_repeat_on() -> None:
    assert Lookup().draft([5, 5, 5], 4) == [5, 5, 5, 5]
    assert Lookup().draft([0, 1, 2, 1, 2, 1, 2], 4) == [1, 2, 1, 2]


def test_nothing_is_drafted_without_an_earlier_place_or_room() -> None:
    for tokens in ([], [1], [1, 2], [1, 2, 3]):
        assert Lookup().draft(tokens, 4) == []
    assert Lookup().draft([5, 5, 5, 5], 0) == []


def test_an_index_that_grows_finds_what_one_from_scratch_finds() -> None:
    choose = random.Random(0)
    growing, tokens = Lookup(), [1]
    for _ in range(500):
        tokens += [choose.randrange(4) for _ in range(choose.randint(1, 3))]
        assert growing.draft(tokens, 4) == Lookup().draft(tokens, 4)


def test_drafts_grow_with_success_shrink_with_failure_and_rest() -> None:
    lookup, tokens = Lookup(), [5] * 40
    assert len(lookup.draft(tokens, 99)) == 4
    lookup.result(4, 4, 40)
    assert len(lookup.draft(tokens, 99)) == 8
    lookup.result(8, 1, 40)
    assert len(lookup.draft(tokens, 99)) == 3
    for _ in range(5):
        lookup.result(3, 0, 40)
    assert lookup.draft(tokens, 99) == []
    assert lookup.draft([5] * 2000, 99) != []
