from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pydantic
import pytest
import torch
from test_vision import DIGITS, make_dataset

from gulliver.core.context import Context
from gulliver.core.errors import ConfigError, GulliverError
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import verify
from gulliver.core.store.store import Store
from gulliver.learning import loop as loop_module
from gulliver.tasks import get_task
from gulliver.train.options import TrainOptions
from gulliver.train.train import _state, run

TASK = get_task("vision")
TOY = TrainOptions(steps=8, batch_size=8, checkpoint_every=3, warmup_steps=2)


def make_context(home, work="work", seed=0):
    folder = home / work
    folder.mkdir(parents=True, exist_ok=True)
    return Context(store=Store(home), progress=Progress(quiet=True), work=folder, step="train", seed=seed)


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def dataset_in(home):
    rows = [{**row, "split": split} for split in ("train", "eval") for row in list(TASK.rows(DIGITS, split))[::9]]
    return make_dataset(Store(home).artifacts_folder, rows)


def test_it_learns_digits_far_beyond_the_majority_class(home):
    dataset = dataset_in(home)
    cfg = TrainOptions(steps=50, batch_size=32, learning_rate=3e-3, warmup_steps=5)
    context = replace(make_context(home), inputs={"dataset": (dataset.id,)})
    model = run(cfg, {"dataset": dataset}, context)
    verify(model)
    assert (model.kind, model.task, model.inputs) == ("model", "vision", {"dataset": (dataset.id,)})
    assert model.step["name"] == "train" and model.config["task"] == "vision" and model.config["steps"] == 50
    assert set(model.files) == {"calibration.json", "config.json", "model.safetensors", "training.json"}
    rows = {row.metric: row for row in TASK.score(TASK.load(model.path), dataset, folder=model.path)}
    assert rows["accuracy"].value > 0.75
    assert rows["accuracy_vs_baseline"].low > 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_interrupted_run_ends_with_the_same_id(home, monkeypatch, optimizer):
    dataset, cfg = dataset_in(home), TOY.model_copy(update={"optimizer": optimizer})
    whole = run(cfg, {"dataset": dataset}, make_context(home, "whole"))
    real, seen = loop_module._update, []

    def stop_at_five(*args):
        seen.append(args[3])
        if len(seen) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop_module, "_update", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, {"dataset": dataset}, make_context(home, "broken"))
    assert run(cfg, {"dataset": dataset}, make_context(home, "broken")).id == whole.id
    assert seen == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]


CHILD = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from gulliver.core.store.store import Store
    from gulliver.learning import loop
    from gulliver.train.train import run
    from test_train import TOY, make_context

    home, dataset, work, kill_at = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    real = loop._update

    def update(*args):
        if args[3] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    loop._update = update
    print(run(TOY, {{"dataset": Store(home).get(dataset)}}, make_context(home, work)).id)
"""


def test_a_killed_run_ends_with_the_same_id(home):
    script = textwrap.dedent(CHILD.format(tests=os.path.dirname(__file__)))
    dataset = dataset_in(home)

    def child(work, kill_at):
        command = [sys.executable, "-c", script, str(home), dataset.id, work, str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    whole = child("whole", -1)
    assert whole.returncode == 0, whole.stderr
    assert child("broken", 7).returncode == -signal.SIGKILL
    assert (home / "broken" / "loop.safetensors").is_file()
    again = child("broken", -1)
    assert again.returncode == 0, again.stderr
    assert again.stdout == whole.stdout


def test_the_seed_changes_the_model_and_checkpoints_do_not_change_the_weights(home):
    dataset = dataset_in(home)
    one, other, often = (
        run(cfg, {"dataset": dataset}, make_context(home, f"work{number}", seed))
        for number, (cfg, seed) in enumerate([(TOY, 0), (TOY, 1), (TOY.model_copy(update={"checkpoint_every": 1}), 0)])
    )
    hashes = [model.files["model.safetensors"].sha256 for model in (one, other, often)]
    assert hashes[0] != hashes[1] and hashes[0] == hashes[2]


def test_a_dataset_of_another_task_is_refused(home):
    dataset = make_dataset(Store(home).artifacts_folder, task="language")
    with pytest.raises(ConfigError, match="task is 'vision', but the dataset is for 'language'"):
        run(TOY.model_copy(update={"task": "vision"}), {"dataset": dataset}, make_context(home))


def test_an_option_of_another_family_is_refused(home):
    with pytest.raises(ConfigError, match="the vision family: unknown option 'tokens'"):
        run(TOY.model_copy(update={"family": {"tokens": 64}}), {"dataset": dataset_in(home)}, make_context(home))


def test_a_rate_that_explodes_stops_and_makes_nothing(home):
    dataset = dataset_in(home)
    cfg = TOY.model_copy(update={"learning_rate": 1e30, "optimizer": "sgd"})
    with pytest.raises(GulliverError, match="Lower the learning rate"):
        run(cfg, {"dataset": dataset}, make_context(home))
    assert [artifact.kind for artifact in Store(home).artifacts()] == ["dataset"]


@pytest.mark.parametrize(
    "dials", [{"steps": 0}, {"optimizer": "adam"}, {"learning_rate": 0}, {"rate": 1}, {"max_grad_norm": float("nan")}]
)
def test_wrong_options_are_refused(dials):
    with pytest.raises(pydantic.ValidationError):
        TrainOptions(**dials)


def test_running_statistics_are_state_and_parameters_are_not():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    assert set(_state(model)) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
