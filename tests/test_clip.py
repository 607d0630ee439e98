"""Clipping: what each limit bounds, that what is within it stays, and the share that is recorded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gulliver.core.errors import ConfigError
from gulliver.learning.clip import LEAST_UNIT, Clipping, unit_norms


def clipped(clipping: Clipping, scale: float = 1.0) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor], float]:
    """(gradients after, before, share) of a matrix whose rows have gradients of growing length, and a vector."""
    matrix, vector = torch.full((4, 9), 0.1), torch.full((4,), 2.0)
    rows = torch.tensor([0.001, 0.01, 0.1, 1.0])[:, None].expand(4, 9)
    before = {matrix: rows.clone(), vector: torch.tensor([3.0, 0.0, 0.0, 4.0])}
    after = {parameter: gradient.clone() / scale for parameter, gradient in before.items()}
    norm = float(torch.cat([one.flatten() for one in before.values()]).norm())
    return after, before, clipping.apply(after, norm, scale)


def test_by_norm_all_keep_their_direction() -> None:
    after, before, share = clipped(Clipping("norm", 1.0), scale=0.5)
    whole = torch.cat([one.flatten() for one in after.values()])
    start = torch.cat([one.flatten() for one in before.values()])
    assert float(whole.norm()) == pytest.approx(1.0, rel=1e-5) and share == 1.0
    assert float(whole @ start / start.norm()) == pytest.approx(1.0, rel=1e-5)
    after, before, share = clipped(Clipping("norm", 100.0))
    assert share == 0.0 and all(torch.equal(after[key], before[key]) for key in before)


def test_by_value_each_number_is_cut() -> None:
    after, before, share = clipped(Clipping("value", 0.05), scale=0.5)
    assert max(float(one.abs().max()) for one in after.values()) == pytest.approx(0.05)
    assert share == (2 * 9 + 2) / (4 * 9 + 4)
    for key, gradient in after.items():
        kept = before[key].abs() <= 0.05
        assert torch.equal(gradient[kept], before[key][kept])


def test_by_unit_the_ratio_of_each_is_bounded() -> None:
    limit = 0.3
    after, before, share = clipped(Clipping("unit", limit), scale=2.0)
    for parameter, gradient in after.items():
        ratios = unit_norms(gradient) / unit_norms(parameter).clamp_min(LEAST_UNIT)
        assert float(ratios.max()) <= limit * (1 + 1e-5)
        small = (unit_norms(before[parameter]) <= limit * unit_norms(parameter)).expand_as(gradient)
        torch.testing.assert_close(gradient[small], before[parameter][small])
    assert share == 3 / 5, "two rows and the vector"


def test_a_unit_of_zeros_can_still_move() -> None:
    weight, gradient = torch.zeros(1, 4), torch.ones(1, 4)
    Clipping("unit", 0.5).apply(found := {weight: gradient}, 2.0, 1.0)
    assert float(found[weight].norm()) == pytest.approx(0.5 * LEAST_UNIT)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan])
def test_limits_that_mean_nothing_are_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match="must be a positive number"):
        Clipping("norm", limit)
