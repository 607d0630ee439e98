"""What the options of `train` do to a run, from the table of steps to the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_samples import text, write_dataset
from safetensors.torch import load_file
from test_train import dataset_in, make_context

from gulliver.core.errors import ConfigError
from gulliver.core.records import Training
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.store import Store
from gulliver.learning import loop as loop_module
from gulliver.pipeline.steps import WrongKey, checked_config, find
from gulliver.tasks import get_task
from gulliver.train.options import TrainOptions
from gulliver.train.train import run

SHORT = {"steps": 4, "batch_size": 16, "warmup_steps": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options") / "home"


@pytest.fixture(scope="module")
def digits_set(home: Path) -> Artifact:
    return dataset_in(home)


@pytest.fixture(scope="module")
def text_set(home: Path) -> Artifact:
    return write_dataset(Store(home).artifacts_folder, [text(200, 1)], [text(60, 2)])


@pytest.fixture
def trained(home: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """The model of a short run with these options."""

    def made(dataset: Artifact, work: str = "work", **options: Any) -> Artifact:
        context = make_context(home, str(tmp_path / f"{work}-{dataset.task}"))
        return run(TrainOptions(**SHORT | options), {"dataset": dataset}, context)

    return made


def weights(model: Artifact) -> dict[str, torch.Tensor]:
    return load_file(model.path / "model.safetensors")


def losses(model: Artifact) -> list[float]:
    return list(Training.of(model).losses)


# ---- memory and precision --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_are_the_batch(trained: Callable[..., Artifact], digits_set: Artifact, parts: int) -> None:
    whole, parted = trained(digits_set, "whole"), trained(digits_set, f"parts{parts}", accumulate=parts)
    assert losses(parted) == pytest.approx(losses(whole), abs=1e-5)


def test_recomputing_changes_no_bit(trained: Callable[..., Artifact], text_set: Artifact) -> None:
    options = {"family": {"tokens": 24}, "dropout": 0.1, "stochastic_depth": 0.2}
    plain, again = (trained(text_set, str(value), recompute=value, **options) for value in (False, True))
    assert plain.files["model.safetensors"].sha256 == again.files["model.safetensors"].sha256


@pytest.mark.parametrize("precision", ["autocast", "stochastic", "compensated"])
def test_precisions_learn_as_float32_does(trained: Callable[..., Artifact], text_set: Artifact, precision: str) -> None:
    dials = {"family": {"tokens": 24}, "steps": 12, "learning_rate": 3e-3}
    exact, other = trained(text_set, "float32", **dials), trained(text_set, precision, precision=precision, **dials)
    assert losses(other)[-1] == pytest.approx(losses(exact)[-1], rel=0.03)
    assert losses(other)[-1] < 0.9 * losses(other)[0]
    kept = {one.dtype for one in weights(other).values() if one.dim() >= 2}
    assert kept == {torch.float32 if precision == "autocast" else torch.bfloat16}
    get_task("language").load(other.path)


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_bfloat16_weights_of_images_train_with_every_optimizer(
    trained: Callable[..., Artifact], digits_set: Artifact, optimizer: str
) -> None:
    model = trained(digits_set, optimizer, optimizer=optimizer, precision="stochastic", learning_rate=1e-2, steps=10)
    assert min(losses(model)[-3:]) < losses(model)[0]


# ---- what is measured ------------------------------------------------------------------------------------------------
def test_measuring_changes_no_weight(trained: Callable[..., Artifact], text_set: Artifact) -> None:
    dials = {"family": {"tokens": 24}, "dropout": 0.3}
    plain = trained(text_set, "unmeasured", **dials)
    measured = trained(text_set, "measured", evaluate_every=1, **dials)
    assert plain.files["model.safetensors"].sha256 == measured.files["model.safetensors"].sha256


def test_each_held_out_example_is_measured_once(trained: Callable[..., Artifact], digits_set: Artifact) -> None:
    held_out = len(list(get_task("vision").rows(digits_set.path, "eval")))
    model = trained(digits_set, "once", evaluate_every=4, evaluate_batches=10_000, batch_size=8)
    (row,) = Training.of(model).held_out
    assert row.examples == held_out and held_out % 8


def test_patience_ends_a_run_at_the_right_step_and_evidence_says_so(
    trained: Callable[..., Artifact], digits_set: Artifact, home: Path
) -> None:
    rules = {"evaluate_every": 2, "patience": 2, "keep": "best"}
    model = trained(digits_set, "early", steps=60, learning_rate=1.0, optimizer="sgd", **rules)
    record = Training.of(model)
    found = [row.loss for row in record.held_out]
    best = found.index(min(found))
    assert record.stopped_early and len(found) == best + 3 and len(record.losses) == 2 * len(found) < 60
    row = next(row for row in Store(home).evidence(model.id) if row.metric == "kept_step")
    assert row.value == record.kept_step == 2 * (best + 1)
    expected = {"ended": "patience", "updates": len(record.losses), "patience": 2, "keep": "best"}
    assert expected.items() <= row.detail.items()


def test_a_plateau_cuts_the_rate(trained: Callable[..., Artifact], digits_set: Artifact) -> None:
    plateau = {"schedule": "plateau", "plateau_patience": 1, "plateau_shrink": 0.5, "evaluate_every": 1}
    model = trained(digits_set, "plateau", steps=12, learning_rate=1.0, optimizer="sgd", **plateau)
    auto = trained(digits_set, "auto-plateau", learning_rate="auto", **plateau)
    assert Training.of(auto).rate_test is not None
    record = Training.of(model)
    assert set(record.rates) <= {0.5**cuts for cuts in range(12)} and record.rates[-1] < record.rates[0]


# ---- resuming --------------------------------------------------------------------------------------------------------
MUCH = {
    "optimizer": "muon",
    "schedule": "one-cycle",
    "average": "ema",
    "ema_decay": 0.5,
    "evaluate_every": 2,
    "keep": "best",
    "dropout": 0.2,
    "stochastic_depth": 0.2,
    "precision": "stochastic",
    "accumulate": 2,
    "checkpoint_every": 2,
    "family": {"tokens": 24},
    "steps": 6,
}


@pytest.mark.parametrize("options", [MUCH, MUCH | {"precision": "compensated", "learning_rate": "auto"}])
@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_ends_with_the_same_model(
    trained: Callable[..., Artifact],
    text_set: Artifact,
    options: dict[str, Any],
    stop: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = trained(text_set, "whole", **options)
    real = loop_module._update

    def interrupted(*args: Any) -> None:
        if args[3] == stop and args[4].steps == 6:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(text_set, "broken", **options)
    torch.manual_seed(stop)
    assert trained(text_set, "broken", **options).id == whole.id


# ---- from a user's words ---------------------------------------------------------------------------------------------
def test_every_technique_is_reached_from_the_command_line(
    command: Callable[..., tuple[int, str, str]], digits_set: Artifact, home: Path
) -> None:
    words = "--steps 4 --batch-size 8 --accumulate 4 --optimizer sgd --nesterov --momentum 0.8 --learning-rate 0.01"
    words += " --warmup-steps 1 --schedule wsd --decay-steps 2 --max-unit-ratio 0.01 --average mean --average-from 1"
    words += " --evaluate-every 2 --keep best --patience 1 --label-smoothing 0.1 --layer-decay 0.9 --edge-rate 0.5"
    words += " --vector-rate 2 --recompute --precision autocast --json"
    code, out, error = command("train", digits_set.id, *words.split(), "--home", home)
    assert code == 0, error
    model = Store(home).get(json.loads(out)["id"])
    record = Training.of(model)
    assert record.clipped_by == "unit" and 0 < record.clipped[0] <= 1 and record.rates[-1] < record.rates[1]
    code, _, error = command("train", digits_set.id, "--dropout", "0.1", "--home", home)
    assert code == 2 and "dropout: Inception has no place for it" in error


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("learning_rate", "fast", "learning_rate = 'fast' is not valid"),
        ("learning_rate", True, "learning_rate = True is not valid"),
        ("learning_rate", 0, "learning_rate = 0 is not valid"),
        ("max_grad_norm", True, "max_grad_norm = True is not valid"),
        ("max_unit_ratio", -1, "max_unit_ratio = -1 is not valid"),
        ("momentum", 1, "momentum = 1 is not valid"),
        ("ema_decay", "nan", "ema_decay = 'nan' is not valid"),
        ("dropout", 1.0, "dropout = 1.0 is not valid"),
        ("patience", 3, "patience = 3 needs held-out data; set evaluate_every"),
        ("schedul", "wsd", "has no key 'schedul'; did you mean 'schedule'"),
    ],
)
def test_wrong_values_are_refused_by_name(key: str, value: Any, told: str) -> None:
    with pytest.raises(WrongKey, match=told):
        checked_config(find("train"), {key: value})
    assert checked_config(find("train"), {"learning_rate": "auto"}).learning_rate == "auto"
    assert checked_config(find("train"), {"learning_rate": "0.01"}).learning_rate == 0.01


def test_a_family_without_a_loss_says_so(trained: Callable[..., Artifact], text_set: Artifact) -> None:
    with pytest.raises(ConfigError, match="an encoder has no loss of its own"):
        trained(text_set, "encoder", task="encoder")
