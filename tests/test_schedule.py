"""Schedules at given steps, against torch's own where it has one."""

from __future__ import annotations

import pytest
import torch

from gulliver.core.errors import ConfigError
from gulliver.learning.schedule import Schedule, plateaus


def factors(schedule: Schedule, steps: int, held_out: tuple[float, ...] = ()) -> list[float]:
    return [schedule.factor(step, steps, held_out) for step in range(steps)]


def test_warmup_stable_decay() -> None:
    found = factors(Schedule(2, "wsd", decay_steps=4), 10)
    assert found == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_constant_and_range() -> None:
    assert factors(Schedule(4, "constant"), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    rising = factors(Schedule(name="range"), 7)
    assert rising == [pytest.approx(10.0**power) for power in range(-6, 1)]


@pytest.mark.parametrize("warmup", [1, 5, 11])
def test_one_cycle_is_that_of_torch(warmup: int) -> None:
    steps = 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, pct_start=(warmup + 1) / steps
    )
    ours = Schedule(warmup, "one-cycle")
    for step in range(steps):
        group = optimizer.param_groups[0]
        assert ours.factor(step, steps) == pytest.approx(group["lr"], abs=1e-9)
        assert ours.momentum(step, steps) == pytest.approx(group["momentum"])
        optimizer.step()
        if step + 1 < steps:
            theirs.step()
    assert Schedule(warmup).momentum(0, steps) is None


def test_a_plateau_cuts_the_rate_after_patience() -> None:
    schedule = Schedule(1, "plateau", patience=2, shrink=0.1)
    told = {(): 1.0, (3.0, 2.0, 2.0): 1.0, (3.0, 2.0, 2.0, 2.5): 0.1, (3.0, 3.0, 3.0, 3.0, 3.0): 0.01}
    for held_out, factor in told.items():
        assert schedule.factor(9, 10, held_out) == pytest.approx(factor)
    assert plateaus((3.0, 4.0, 2.0, 4.0, 1.0), 2) == 0, "a better one in between starts the count anew"
    for wrong in ({"patience": 0}, {"shrink": 1.0}):
        with pytest.raises(ConfigError, match="a plateau needs"):
            Schedule(name="plateau", **wrong)  # type: ignore[arg-type]
