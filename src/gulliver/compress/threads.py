"""Many small jobs at once: columns of different weights are rounded side by side, one thread of arithmetic each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from gulliver.core.context import Context

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Iterable[Item], ctx: Context) -> Iterator[Result]:
    """`function` of every item, in order: as many at a time as torch has threads, but one where memory is limited.

    The first exception is raised; nothing new starts then.
    """
    threads = torch.get_num_threads()
    if threads == 1 or ctx.max_ram_bytes is not None:
        yield from map(function, items)
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
