from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gulliver.core.errors import ConfigError
from gulliver.learning.groups import parameter_groups
from gulliver.learning.optim import OptimizerConfig, build_optimizer
from gulliver.learning.schedule import Schedule


def test_warmup_is_linear_and_ends_at_the_peak():
    schedule = Schedule(warmup_steps=4)
    assert [schedule.factor(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.factor(4, 100) == 1.0


def test_cosine_is_half_way_down_in_the_middle_and_ends_near_zero():
    assert Schedule().factor(50, 100) == pytest.approx(0.5)
    assert 0.0 < Schedule().factor(99, 100) < 0.001


@given(st.integers(1, 300), st.integers(0, 400), st.data())
def test_factor_is_within_bounds_and_matches_torch(steps, warmup, data):
    step = data.draw(st.integers(0, steps - 1))
    value = Schedule(warmup).factor(step, steps)
    assert 0.0 <= value <= 1.0 + 1e-12
    if step >= warmup:
        assert value == pytest.approx((1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def test_each_group_keeps_its_own_rate_and_decay():
    one, two = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [one], "learning_rate": 0.5, "weight_decay": 0.1}, {"params": [two]}]
    updater = build_optimizer(groups, OptimizerConfig("sgd", learning_rate=0.25))
    assert [group["initial_lr"] for group in updater.param_groups] == [0.5, 0.25]
    assert [group["weight_decay"] for group in updater.param_groups] == [0.1, 0.0]


def test_wrong_groups_are_refused():
    one = torch.nn.Parameter(torch.ones(3))
    for groups in ([], [{"params": [one], "lr": 1.0}], [{"params": [one]}, {"params": [one]}]):
        with pytest.raises(ConfigError):
            build_optimizer(groups, OptimizerConfig())
    with pytest.raises(ConfigError, match="learning_rate"):
        build_optimizer([{"params": [one], "learning_rate": float("inf")}], OptimizerConfig())


def test_vectors_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (2, 0.0)]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_one_update_is_the_one_in_the_docstring(name):
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    start, gradient = parameter.detach().clone(), torch.tensor([0.5, -0.25])
    config = OptimizerConfig(name, learning_rate=0.1, weight_decay=0.01)
    updater = build_optimizer([{"params": [parameter]}], config)
    updater.step({parameter: gradient.clone()})
    if name == "sgd":
        expected = start - 0.1 * (gradient + 0.01 * start)
    else:
        expected = start - 0.1 * (0.01 * start + gradient / (gradient.abs() + 1e-8))
    torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_on_a_quadratic_is_its_closed_form(nesterov):
    """p_t of loss h p^2 / 2 is a linear recurrence, whose matrix to the power t is the state after t steps.

    (p, m) -> m' = mu m + h p ;  p' = p - r m' , and for Nesterov p' = p - r (h p + mu m').
    """
    steepness, rate, momentum, steps = 3.0, 0.05, 0.8, 25
    held = momentum * rate if nesterov else rate
    ahead = rate * steepness if nesterov else 0.0
    step = torch.tensor([[1 - ahead - held * steepness, -held * momentum], [steepness, momentum]], dtype=torch.float64)
    expected = torch.linalg.matrix_power(step, steps) @ torch.tensor([2.0, 0.0], dtype=torch.float64)
    point = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    config = OptimizerConfig("sgd", learning_rate=rate, momentum=momentum, nesterov=nesterov)
    updater = build_optimizer([{"params": [point]}], config)
    for _ in range(steps):
        updater.step({point: steepness * point.detach()})
    assert float(point.detach()) == pytest.approx(float(expected[0]), rel=1e-10)
    assert float(updater.state[point]["momentum"]) == pytest.approx(float(expected[1]), rel=1e-10)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_updates_are_those_of_torch(name):
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).clone()) for _ in range(2))
    config = OptimizerConfig(name, learning_rate=0.05, weight_decay=0.1, nesterov=name == "sgd")
    updater = build_optimizer([{"params": [ours]}], config)
    if name == "sgd":
        oracle = torch.optim.SGD([theirs], lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True, fused=True)
    else:
        oracle = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        theirs.grad = torch.randn(3, 4, generator=generator)
        updater.step({ours: theirs.grad.clone()})
        oracle.step()
    assert torch.equal(ours, theirs)
