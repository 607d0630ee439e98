"""Many small jobs at once: columns of different weights are rounded side by side, one thread of arithmetic each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from gulliver.core.context import Context

Item = TypeVar("Item")
Result = TypeVar("Result")


def workers(ctx: Context) -> int:
    """Jobs at once: as many as torch has threads, but one where memory is limited."""
    return 1 if ctx.max_ram_bytes is not None else torch.get_num_threads()


def each(function: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """`function` of every item, in order, `count` at a time. The first exception is raised; nothing new starts then."""
    if count == 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
