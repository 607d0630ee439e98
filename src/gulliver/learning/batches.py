"""Random access to batches: item k of one stream, or of several that take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def in_turns(streams: Sequence[Callable[[int], Iterator[Item]]], turns: Sequence[int] = (0,)) -> Callable[[int], Item]:
    """A function from k to item k of `streams`, which are dealt out in the order of `turns`, again and again.

    `streams[s](n)` is an endless iterator that begins at item n of stream s. Free as long as items are asked for in
    order; any other order opens a stream anew.
    """
    opened: dict[int, tuple[int, Iterator[Item]]] = {}

    def at(index: int) -> Item:
        rounds, now = divmod(index, len(turns))
        turn = turns[now]
        place = rounds * turns.count(turn) + turns[:now].count(turn)
        following, stream = opened.get(turn, (-1, iter(())))
        if following != place:
            stream = streams[turn](place)
        opened[turn] = (place + 1, stream)
        return next(stream)

    return at
