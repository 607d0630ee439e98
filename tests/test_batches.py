"""Batch k is the same in whatever order batches are asked for, and costs nothing in order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from gulliver.learning.batches import in_turns


@given(st.lists(st.integers(0, 30), max_size=20), st.sampled_from([(0,), (0, 1, 1, 1), (0, 1, 2), (1, 0, 1)]))
def test_any_order_gives_what_the_turns_say(asked: list[int], turns: tuple[int, ...]) -> None:
    opened: list[tuple[int, int]] = []

    def stream(number: int):
        def begin(place: int) -> Iterator[str]:
            opened.append((number, place))
            return (f"{number}:{at}" for at in count(place))

        return begin

    streams, taken, expected = [stream(number) for number in range(3)], dict.fromkeys(range(3), 0), []
    for index in range(31):
        turn = turns[index % len(turns)]
        expected.append(f"{turn}:{taken[turn]}")
        taken[turn] += 1
    item = in_turns(streams, turns)
    assert [item(index) for index in asked] == [expected[index] for index in asked]
    opened.clear()
    item = in_turns(streams, turns)
    assert [item(index) for index in range(31)] == expected
    assert sorted(opened) == [(turn, 0) for turn in sorted(set(turns))]
