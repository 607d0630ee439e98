"""Weights of bfloat16: small updates are not lost, in either way, and rounding to nearest would lose them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gulliver.learning.optim import OptimizerConfig, build_optimizer
from gulliver.learning.rounding import REST, stochastic


def test_stochastic_rounding_is_unbiased_and_gives_a_neighbour() -> None:
    torch.manual_seed(0)
    for number in (1.001, -1.001, 3.3e-5, -700.9):
        drawn = stochastic(torch.full((40_000,), number))
        below, above = sorted({float(one) for one in drawn.unique()})
        gap = above - below
        assert below < number < above and gap <= abs(number) / 64
        assert float(drawn.double().mean()) == pytest.approx(number, abs=4 * gap / 2 / 200)
    exact = torch.tensor([0.0, 1.0, -0.5, 96.0])
    assert torch.equal(stochastic(exact).float(), exact)


def descended(rounding: str, steps: int = 400) -> tuple[float, nn.Parameter, dict[str, torch.Tensor]]:
    """A weight of one that is told to fall by 1/4096 a step: less than half the distance to the next bfloat16."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.ones(256, dtype=torch.bfloat16))
    config = OptimizerConfig("sgd", learning_rate=2.0**-12, momentum=0.0, rounding=rounding)  # type: ignore[arg-type]
    updater = build_optimizer([{"params": [weight]}], config)
    for _ in range(steps):
        updater.step({weight: torch.ones(256, dtype=torch.bfloat16)})
    return float(weight.detach().double().mean()), weight, updater.state[weight]


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_updates_below_half_a_step_are_not_lost(rounding: str) -> None:
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(400):
        nearest -= 2.0**-12
    assert float(nearest) == 1.0
    mean, weight, state = descended(rounding)
    assert mean == pytest.approx(1 - 400 / 4096, abs=2e-3) and weight.dtype == torch.bfloat16
    assert (REST in state) == (rounding == "compensated")


def test_compensated_sums_are_nearly_those_of_float32() -> None:
    _, weight, state = descended("compensated", 1000)
    assert float((weight.detach().float() + state[REST].float()).mean()) == pytest.approx(1 - 1000 / 4096, abs=2e-4)


def test_state_of_narrow_weights_is_float32() -> None:
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    updater = build_optimizer([{"params": [weight]}], OptimizerConfig("adamw"))
    updater.step({weight: torch.ones(4, 4, dtype=torch.bfloat16)})
    assert {name: one.dtype for name, one in updater.state[weight].items() if name != REST} == dict.fromkeys(
        ("step", "mean", "variance"), torch.float32
    )
