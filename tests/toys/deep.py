"""Calls inside calls, and calls side by side, around one operation: they test what counts frames."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def run(deep: Callable[[int], Any], levels: int) -> None:
    deep(levels)


def down(levels: int) -> torch.Tensor:
    return down(levels - 1) if levels else torch.ones(2, 2).sum()


def side_by_side(levels: int) -> list[torch.Tensor]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(down, [levels] * 4))
