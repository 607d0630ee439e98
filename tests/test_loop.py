from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from gulliver.core.errors import ConfigError, GulliverError
from gulliver.learning.checkpoint import open_checkpoint
from gulliver.learning.clip import Clipping
from gulliver.learning.evaluation import Evaluation
from gulliver.learning.loop import LoopConfig, run_loop
from gulliver.learning.optim import OptimizerConfig
from gulliver.learning.schedule import Schedule

STEPS = 12


class Toy:
    """A small network with dropout and a running statistic: everything that an exact resume must carry."""

    def __init__(self):
        torch.manual_seed(0)
        layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)]
        self.model = nn.Sequential(*layers).train()
        self.state = {name: tensor for name, tensor in self.model.named_buffers()}
        self.calls = []

    def loss(self, index):
        self.calls.append(index)
        generator = torch.Generator().manual_seed(1000 + index)
        x = torch.randn(20, 8, generator=generator)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return nn.functional.cross_entropy(self.model(x), y, reduction="none"), torch.ones(20, dtype=torch.int64)

    def run(self, optimizer="adamw", **dials):
        groups = [
            {"params": list(self.model[0].parameters()), "learning_rate": 0.02},
            {"params": [*self.model[1].parameters(), *self.model[4].parameters()], "weight_decay": 0.1},
        ]
        config = {"steps": STEPS, "accumulate": 2, "clipping": Clipping("norm", 1.0)}
        config |= {"schedule": Schedule(warmup_steps=3), "optimizer": OptimizerConfig(optimizer, learning_rate=0.01)}
        config |= {name: dials.pop(name) for name in list(dials) if name in LoopConfig.__dataclass_fields__}
        return run_loop(
            parameters=groups, config=LoopConfig(**config), **{"loss": self.loss, "state": self.state} | dials
        )

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def assert_same(first, other):
    assert set(first) == set(other)
    assert all(torch.equal(first[name], other[name]) for name in first), "not bitwise equal"


def one(value):
    """A scalar as the loss of one example of one position."""
    return each(value[None])


def each(values):
    """Losses of examples of one position each."""
    return values, torch.ones(len(values), dtype=torch.int64)


def simple(parameters, loss, **dials):
    """A run of one step of plain gradient descent at rate 1, or as the dials say."""
    plain = OptimizerConfig("sgd", learning_rate=1.0, momentum=0.0)
    config = {"steps": 1, "optimizer": plain, "schedule": Schedule(name="constant")} | dials
    rest = {name: config.pop(name) for name in list(config) if name not in LoopConfig.__dataclass_fields__}
    return run_loop(parameters=[{"params": parameters}], loss=loss, config=LoopConfig(**config), **rest)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resume_after_an_exception_is_bitwise_exact(tmp_path, optimizer, stop):
    whole = Toy()
    expected = whole.run(optimizer)
    path = tmp_path / "loop.safetensors"

    class Stop(Exception):
        pass

    def interrupt(step):
        if step == stop:
            raise Stop

    torch.manual_seed(123)
    first = Toy()
    with pytest.raises(Stop):
        first.run(optimizer, checkpoint=path, checkpoint_every=3, after_step=interrupt)
    torch.manual_seed(99)
    second = Toy()
    result = second.run(optimizer, checkpoint=path, checkpoint_every=3)
    assert result.resumed_from == stop // 3 * 3
    assert second.calls == list(range(result.resumed_from * 2, STEPS * 2))
    assert result.losses == expected.losses
    assert_same(second.weights(), whole.weights())


def test_the_same_object_can_be_run_again_after_an_exception(tmp_path):
    whole, toy = Toy(), Toy()
    whole.run()
    toy = Toy()
    calls = []

    def fails_once(index):
        calls.append(index)
        if len(calls) == 12:
            raise RuntimeError("lost the disk")
        return toy.loss(index)

    path = tmp_path / "loop"
    with pytest.raises(RuntimeError):
        toy.run(loss=fails_once, checkpoint=path, checkpoint_every=2)
    toy.run(loss=fails_once, checkpoint=path, checkpoint_every=2)
    assert_same(toy.weights(), whole.weights())


def test_a_finished_run_does_nothing_again(tmp_path):
    path = tmp_path / "loop"
    first = Toy()
    losses = first.run(checkpoint=path).losses
    second = Toy()
    result = second.run(checkpoint=path)
    assert second.calls == [] and result.resumed_from == STEPS and result.losses == losses
    assert_same(second.weights(), first.weights())


CHILD = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from gulliver.learning.average import Averaging
    from gulliver.learning.evaluation import Evaluation
    from test_loop import Toy

    path, kill_at = Path(sys.argv[1]), int(sys.argv[2])

    def after_step(step):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    toy = Toy()
    evaluation = Evaluation(lambda: toy.loss(999), every=3, keep="best")
    judged = {{"averaging": Averaging("ema", 0.7), "evaluation": evaluation}}
    result = toy.run(checkpoint=path / "loop", checkpoint_every=2, after_step=after_step, **judged)
    save_file(toy.weights(), path / "weights.safetensors")
    print(result.resumed_from)
"""


def test_resume_after_sigkill_is_bitwise_exact(tmp_path):
    from safetensors.torch import load_file

    script = textwrap.dedent(CHILD.format(tests=os.path.dirname(__file__)))

    def child(folder, kill_at):
        command = [sys.executable, "-c", script, str(folder), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert child(whole, -1).returncode == 0
    assert child(broken, 6).returncode == -signal.SIGKILL
    finished = child(broken, -1)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "6"
    assert_same(load_file(broken / "weights.safetensors"), load_file(whole / "weights.safetensors"))


def test_it_learns_and_clipping_bounds_the_update():
    toy = Toy()
    result = toy.run(steps=60)
    assert sum(result.losses[-5:]) < 0.7 * sum(result.losses[:5])
    weight = nn.Parameter(torch.zeros(4))
    simple([weight], lambda index: one((weight * 100.0).sum()), clipping=Clipping("norm", 0.5))
    assert weight.detach().norm().item() == pytest.approx(0.5, rel=1e-4)


def test_accumulation_equals_one_large_batch():
    def train(parts):
        weight = nn.Parameter(torch.linspace(-1, 1, 4))
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
        chunks = x.chunk(parts)
        dials = {"steps": 5, "accumulate": parts, "optimizer": OptimizerConfig("sgd", learning_rate=0.05)}
        simple([weight], lambda index: each(((chunks[index % parts] @ weight) - 1.0).square()), **dials)
        return weight.detach()

    torch.testing.assert_close(train(4), train(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_last_good_one(tmp_path, bad):
    toy = Toy()

    def loss(index):
        values, counts = toy.loss(index)
        return values * (bad if index == 11 else 1.0), counts

    path = tmp_path / "loop"
    told = rf"the loss is {bad} at step 5 \(batch 11\); the last good checkpoint is .*loop. Lower the learning rate"
    with pytest.raises(GulliverError, match=told):
        toy.run(loss=loss, checkpoint=path, checkpoint_every=1)
    found = open_checkpoint(path)
    assert len(found.meta["history"]["losses"]) == 5
    assert all(torch.isfinite(tensor.float()).all() for _, tensor in found.tensors())


def test_a_gradient_that_is_not_finite_stops():
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(GulliverError, match="gradient's norm is"):
        simple([weight], lambda index: one(weight.sqrt().sum()))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "loop"
    Toy().run(checkpoint=path)
    with pytest.raises(ConfigError, match="steps is 12 there and 13 here"):
        Toy().run(checkpoint=path, steps=13)
    with pytest.raises(ConfigError, match="optimizer"):
        Toy().run("sgd", checkpoint=path)


@pytest.mark.parametrize("dials", [{"steps": 0}, {"accumulate": 0}, {"checkpoint_every": 0}])
def test_wrong_dials_are_refused(dials):
    with pytest.raises(ConfigError):
        Toy().run(**dials)


def test_progress_counts_only_what_is_left(tmp_path):
    class Bar:
        def __init__(self):
            self.notes = []

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def advance(self, note=""):
            self.notes.append(note)

    class Progress:
        def __init__(self):
            self.stages, self.bar = [], Bar()

        def stage(self, name, total, unit):
            self.stages.append((name, total, unit))
            return self.bar

    progress = Progress()
    result = Toy().run(progress=progress, stage="distill")
    assert progress.stages == [("distill", STEPS, "step")]
    assert progress.bar.notes[-1] == f"loss {result.losses[-1]:.4g}" and len(progress.bar.notes) == STEPS


def test_norms_of_blocks_are_taken_over_time():
    small, large = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))

    def loss(index):
        values = torch.stack([3e-6 * small.sum(), 4.0 * large.sum()])
        return values, torch.tensor([2, 2])

    dials = {"blocks": {"first": [small], "last": [large]}, "steps": 450, "clipping": Clipping("norm", 1.0)}
    history = simple([small, large], loss, **dials).history
    assert (
        history.norm_steps == list(range(0, 450, 3)) and len(history.weight_norms) == len(history.gradient_norms) == 150
    )
    assert history.gradient_norms[7] == pytest.approx([1.5e-6 * 3**0.5, 2.0 * 2], rel=1e-5), "before clipping"
    assert history.weight_norms[0] == pytest.approx([1.5e-6 * 3**0.5 / 4, 1.0], rel=1e-4), "after the update"
    assert history.clipped == [1.0] * 450


def test_a_held_out_loss_that_is_not_finite_stops_and_keeps_the_last_good_one(tmp_path):
    path, told = tmp_path / "loop", iter([1.0, float("nan")])
    evaluation = Evaluation(lambda: each(torch.full((3,), next(told))), every=2, patience=1, keep="best")
    with pytest.raises(GulliverError, match=r"the held-out loss is nan at step 3 \(batch of held-out data\); the last"):
        Toy().run(evaluation=evaluation, checkpoint=path, checkpoint_every=1)
    assert [one["loss"] for one in open_checkpoint(path).meta["history"]["evaluations"]] == [1.0]
