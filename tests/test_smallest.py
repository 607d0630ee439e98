"""The search for the smallest size within a loss, on curves that are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from gulliver.core.records import PlannedPoint
from gulliver.pipeline.smallest import AIM, CLOSE, ROUNDS, next_size


def frontier(loss: Callable[[float], float]) -> list[PlannedPoint]:
    return [PlannedPoint(size_bytes=size, loss_increase=loss(size)) for size in range(20_000, 80_001, 5_000)]


def searched(
    predicted: Callable[[float], float], true: Callable[[float], float], limit: float
) -> list[tuple[int, float, bool]]:
    """Every round of a search, as `next_size` is given them."""
    points, size, found = frontier(predicted), 30_000, []
    for _ in range(ROUNDS):
        found.append((size, true(size), true(size) <= limit))
        size = next_size(points, found, limit)
        if size is None:
            return found
    return found


def falling(size: float) -> float:
    return math.exp(-(size - 20_000) / 9_000)


@pytest.mark.parametrize(
    "true",
    [
        falling,
        lambda size: 7 * falling(size),
        lambda size: 0.02 * falling(size),
        lambda size: falling(size) ** 1.6,
        lambda size: 0.4 * falling(size) ** 0.7,
        lambda size: falling(size) + 0.01 * math.sin(size / 700) * falling(size),
    ],
)
@pytest.mark.parametrize("limit", [0.3, 0.05, 0.02])
def test_it_ends_close_to_the_smallest_that_passes(true: Callable[[float], float], limit: float) -> None:
    sizes = [size for size in range(20_000, 80_001, 50) if true(size) <= limit]
    good = [size for size, _, passed in searched(falling, true, limit) if passed]
    assert bool(good) == bool(sizes)
    if sizes:
        assert min(good) <= 1.05 * sizes[0], (min(good), sizes[0])


def test_nothing_passes_and_the_largest_was_tried() -> None:
    found = searched(falling, lambda size: 1.0 + falling(size), 0.1)
    assert not any(passed for *_, passed in found)
    assert found[-1][0] >= (1 - CLOSE) * 80_000 or len(found) == ROUNDS


def test_the_smallest_plan_is_tried_when_all_pass() -> None:
    assert searched(falling, lambda size: 1e-9, 0.1)[-1][0] == 20_000


def test_a_search_that_has_what_it_wants_ends() -> None:
    limit, points = 0.1, frontier(falling)
    size = 20_000 - 9_000 * math.log(AIM * limit)
    assert next_size(points, [(math.ceil(size), falling(size), True)], limit) is None
