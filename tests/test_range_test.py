"""The test of rates: it ends where the loss does, and suggests a rate that trains."""

from __future__ import annotations

import pytest
import torch
from test_loop import each, simple
from torch import Tensor, nn

from gulliver.core.errors import DataError
from gulliver.learning.loop import LoopConfig
from gulliver.learning.optim import OptimizerConfig
from gulliver.learning.range_test import BACK, STEPS, TOP_RATE, run_range_test, suggestion
from gulliver.learning.schedule import Schedule

DESCENT = OptimizerConfig("sgd", momentum=0.0)


def bowl(steepness: float) -> tuple[nn.Parameter, LoopConfig]:
    """A weight at one, to be brought to zero: plain descent is stable below a rate of 2 / steepness."""
    return nn.Parameter(torch.ones(1)), LoopConfig(1, DESCENT, Schedule(name="constant"), accumulate=2)


@pytest.mark.parametrize("steepness", [0.5, 20.0, 3000.0])
def test_the_suggestion_is_below_what_diverges_and_trains(steepness: float) -> None:
    weight, config = bowl(steepness)

    def loss(index: int) -> tuple[Tensor, Tensor]:
        return each(steepness * weight.square() / 2)

    found = run_range_test(lambda rate: [{"params": [weight], "learning_rate": rate}], loss, config, None)
    assert found.rates[0] == pytest.approx(TOP_RATE * 1e-6) and list(found.rates) == sorted(found.rates)
    assert len(found.losses) == len(found.rates) <= STEPS
    assert 0.005 / steepness < found.suggested < 2 / steepness
    weight.data.fill_(1.0)
    tried = OptimizerConfig("sgd", learning_rate=found.suggested, momentum=0.0)
    assert simple([weight], loss, steps=100, optimizer=tried).losses[-1] < 0.5 * steepness / 2


def test_a_loss_that_ends_is_not_in_it() -> None:
    weight, config = bowl(1.0)

    def loss(index: int) -> tuple[Tensor, Tensor]:
        return each(weight.square() * (float("nan") if index >= 2 * 30 + 1 else 1.0))

    found = run_range_test(lambda rate: [{"params": [weight], "learning_rate": rate}], loss, config, None)
    assert len(found.losses) == 30
    with pytest.raises(DataError, match="finite for 4 steps of the test of rates; give a learning_rate"):
        suggestion([0.1] * 4, [1.0] * 4)


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss() -> None:
    rates = [10 ** (power / 10) for power in range(-60, 11)]
    losses = [1.0 if rate < 1e-4 else 0.2 if rate < 1e-1 else 5.0 for rate in rates]
    assert suggestion(rates, losses) == pytest.approx(0.1 / BACK, rel=0.25)
