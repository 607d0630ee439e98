"""What a run decides on the way: averages, evaluations, early stopping, which weights are kept, and a tested rate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import Toy, assert_same, each
from test_train import dataset_in, make_context

from gulliver.core.errors import ConfigError
from gulliver.core.records import Training
from gulliver.core.store.store import Store
from gulliver.learning.average import Averaging
from gulliver.learning.evaluation import Evaluation
from gulliver.train.options import TrainOptions
from gulliver.train.train import run

AVERAGES = [Averaging("ema", 0.8), Averaging("ema", 0.8, start=4), Averaging("mean"), Averaging("mean", start=5)]


@pytest.mark.parametrize("averaging", AVERAGES, ids=str)
def test_an_average_is_that_of_all_steps_buffers_included(averaging: Averaging) -> None:
    toy, seen = Toy(), []
    toy.run(averaging=averaging, after_step=lambda step: seen.append(toy.weights()))
    states, kept = seen[averaging.start :], toy.weights()
    for name, value in kept.items():
        if not value.is_floating_point():
            assert torch.equal(value, states[-1][name])
            continue
        expected = states[0][name].float()
        for count, state in enumerate(states[1:], start=2):
            share = 0.2 if averaging.kind == "ema" else 1 / count
            expected = expected + share * (state[name] - expected)
        assert torch.allclose(value, expected, atol=1e-6), name
    assert any("running" in name for name in kept)


def scripted(losses: list[float], **more: Any) -> Evaluation:
    """An evaluation after every second step whose losses are these."""
    left = iter(losses)
    return Evaluation(lambda: each(torch.full((4,), next(left))), every=2, **more)


def test_patience_ends_a_run_and_the_best_weights_are_kept() -> None:
    toy, seen = Toy(), {}
    evaluation = scripted([3.0, 2.0, 2.5, 2.25, 9.0], patience=2, keep="best")
    result = toy.run(evaluation=evaluation, after_step=lambda step: seen.update({step + 1: toy.weights()}))
    assert (result.kept_step, result.stopped_early, len(result.losses)) == (4, True, 8)
    assert_same(toy.weights(), seen[4])
    toy = Toy()
    result = toy.run(evaluation=scripted([3.0, 2.0, 2.5, 2.25, 9.0], patience=2))
    assert (result.kept_step, result.stopped_early) == (8, True)


@pytest.mark.parametrize("stop", [3, 6])
def test_a_killed_run_decides_what_the_whole_one_did(tmp_path: Path, stop: int) -> None:
    def dials() -> dict[str, Any]:
        return {"averaging": Averaging("ema", 0.9), "checkpoint_every": 1}

    def measure(toy: Toy) -> Evaluation:
        return Evaluation(lambda: toy.loss(9_999), every=2, patience=3, keep="best")

    whole = Toy()
    expected = whole.run(evaluation=measure(whole), **dials())

    def killed(step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    broken, again = Toy(), Toy()
    with pytest.raises(KeyboardInterrupt):
        broken.run(evaluation=measure(broken), checkpoint=tmp_path / "c", after_step=killed, **dials())
    result = again.run(evaluation=measure(again), checkpoint=tmp_path / "c", **dials())
    assert result.resumed_from == stop
    assert (result.kept_step, result.history.evaluations) == (expected.kept_step, expected.history.evaluations)
    assert_same(again.weights(), whole.weights())


def test_the_decision_is_evidence_and_in_the_record(tmp_path: Path) -> None:
    home = tmp_path / "home"
    dataset = dataset_in(home)
    cfg = TrainOptions(steps=12, batch_size=16, warmup_steps=1, evaluate_every=4, keep="best", average="ema")
    context = replace(make_context(home), inputs={"dataset": (dataset.id,)})
    model = run(cfg, {"dataset": dataset}, context)
    record = Training.of(model)
    assert [row.step for row in record.held_out] == [4, 8, 12] and record.kept_step in (4, 8, 12)
    found = {row.metric: row for row in Store(home).evidence(model.id)}
    lowest = min(row.loss for row in record.held_out)
    assert found["kept_step"].value == record.kept_step and found["selection_loss"].value == lowest
    assert found["selection_loss"].low < lowest < found["selection_loss"].high
    assert record.norms is not None and len(record.norms.blocks) == len(record.norms.gradients[0])
    assert len(record.clipped) == len(record.rates) == len(record.losses) == 12


def test_a_rate_can_be_tested_for(tmp_path: Path) -> None:
    home = tmp_path / "home"
    dataset = dataset_in(home)
    cfg = TrainOptions(steps=30, batch_size=32, learning_rate="auto", warmup_steps=3)
    model = run(cfg, {"dataset": dataset}, make_context(home))
    record = Training.of(model)
    assert record.rate_test is not None and 1e-5 < record.rate_test.suggested < 1
    assert model.config["learning_rate"] == record.rate_test.suggested
    assert record.losses[-1] < 0.6 * record.losses[0]
    assert json.loads(model.file("training.json").read_text())["rate_test"]["rates"][0] < 1e-4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"patience": 2}, "patience"),
        ({"keep": "best"}, "keep"),
        ({"schedule": "plateau"}, "schedule"),
        ({"nesterov": True}, "nesterov"),
        ({"ema_decay": 0.9}, "ema_decay"),
        ({"decay_steps": 4}, "decay_steps"),
        ({"max_grad_norm": 1.0, "max_grad_value": 1.0}, "two ways to clip"),
        ({"batch_size": 10, "accumulate": 4}, "accumulate is 4"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainOptions(**options)


def test_an_average_needs_a_decay_below_one() -> None:
    with pytest.raises(ConfigError, match=r"1\.0"):
        Averaging("ema", 1.0)
