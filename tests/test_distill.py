"""The step `distill`: it brings a model, packed or dense, nearer to its parent, in the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_samples import Lab, contents, divergence
from language_samples import write_dataset, write_encoder
from torch import Tensor
from toy_language import write_model

from gulliver.core.errors import BudgetError, ConfigError
from gulliver.core.progress import Progress
from gulliver.core.records import Calibration, Distillation, LossIncrease, Packing
from gulliver.core.store.artifact import Artifact, verify
from gulliver.core.store.store import Store
from gulliver.nets import precision
from gulliver.nets.inception import Inception, InceptionConfig
from gulliver.pipeline.call import call
from gulliver.runtime.packed import PackedTensor
from gulliver.runtime.packing import is_packed
from gulliver.runtime.reference import read_stored
from gulliver.tasks import get_task
from gulliver.tasks.base import Task
from gulliver.tasks.language.task import LanguageTask
from gulliver.tasks.order import Order
from gulliver.train import distill

RATES = {"learning_rate": 1.5e-2, "scale_rate": 3e-4, "vector_rate": 3e-4}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
QUICK = {"batch_size": 8, "tokens": 64, "warmup_steps": 2, **RATES}


def distilled(lab: Lab, model: Artifact, **config: Any) -> Artifact:
    options = QUICK | config
    if lab.model.task != "language":
        del options["tokens"]
    return lab.step("distill", options, model=model, parent=lab.model, dataset=lab.dataset)


@pytest.fixture(scope="module")
def packed(language: Lab) -> Artifact:
    return language.quantize(bits=3)


@pytest.fixture(scope="module")
def dense(language: Lab, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A student of half the parent's width and depth, in bfloat16."""
    folder = write_model(tmp_path_factory.mktemp("students") / "small", steps=60, dtype=torch.bfloat16, **SMALL)
    return language.step("pull", {"source": str(folder)})


def test_distilling_brings_a_model_nearer_to_its_parent(language: Lab, packed: Artifact) -> None:
    made = distilled(language, packed, steps=30)
    before, after = divergence(language, packed), divergence(language, made)
    assert after < 0.85 * before
    losses = contents(made, Distillation.file)["losses"]
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
    verify(made)


def test_sizes_and_formats_stay(language: Lab, packed: Artifact) -> None:
    made = distilled(language, packed, steps=30)
    assert made.weight_bytes == packed.weight_bytes
    assert contents(made, Packing.file) == contents(packed, Packing.file)
    assert contents(made, LossIncrease.file) == contents(packed, LossIncrease.file)
    roles = {"model": (packed.id,), "parent": (language.model.id,), "dataset": (language.dataset.id,)}
    assert made.inputs == roles
    before, after = dict(read_stored(packed.path)), dict(read_stored(made.path))
    assert list(before) == list(after)
    changed = set()
    for name, tensor in before.items():
        if isinstance(tensor, PackedTensor):
            assert [part.format for part in after[name].parts] == [part.format for part in tensor.parts]
            if not tensor.parts[0].codes.equal(after[name].parts[0].codes):
                changed.add("codes")
        else:
            assert after[name].dtype == tensor.dtype
            if not after[name].equal(tensor):
                changed.add("vectors")
    assert changed == {"codes", "vectors"}


def test_a_rate_of_nearly_nothing_changes_nearly_nothing(language: Lab, packed: Artifact) -> None:
    tiny = {"learning_rate": 1e-12, "scale_rate": 0.0, "vector_rate": 0.0}
    made = distilled(language, packed, steps=3, **tiny)
    before, after = divergence(language, packed), divergence(language, made)
    assert after == pytest.approx(before, rel=0.05)  # scales are cut into 8 bits once more


def test_a_network_that_mixes_types_is_distilled_in_float32(
    language: Lab, packed: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    plain, half = Task.loss, []

    def loss(self: Task, *given: Any) -> Tensor:
        half.append(torch.is_autocast_enabled("cpu"))
        if half[-1]:
            raise RuntimeError("index_add_(): self and source expected to have the same dtype")
        return plain(self, *given)

    monkeypatch.setattr(Task, "loss", loss)
    made = distilled(language, packed, steps=2)
    assert half == [True, False, False]
    monkeypatch.undo()
    assert divergence(language, made) < 1


def test_rows_of_several_formats_are_distilled(language: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from gulliver.compress import plan as planning

    monkeypatch.setattr(planning, "MIN_CLASS_ROWS", 8)
    monkeypatch.setattr(planning, "CLASSES", (1 / 8, 1 / 3, 1.0))
    for size_bytes in (47_000, 52_000, 58_000, 64_000):
        model = language.quantize(plan=language.plan(size_bytes, seed=1), seed=1)
        if any(isinstance(tensor, PackedTensor) and len(tensor.parts) > 1 for _, tensor in read_stored(model.path)):
            break
    else:
        pytest.fail("no plan gave a table parts of its own")
    made = distilled(language, model, steps=12, learning_rate=5e-3)
    assert contents(made, Packing.file) == contents(model, Packing.file)
    assert divergence(language, made) < divergence(language, model)


def test_samples_take_their_turn(language: Lab, packed: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    own = write_dataset(language.store.artifacts_folder, ["a child counts the long rope for many words. " * 90], [])
    asked: list[tuple[str, int]] = []
    real = LanguageTask._batches

    def counted(self: Any, dataset: Artifact, split: str, order: Order, *rest: Any):
        for number, batch in enumerate(real(self, dataset, split, order, *rest), start=order.step):
            asked.append((dataset.id, number))
            yield batch

    monkeypatch.setattr(LanguageTask, "_batches", counted)
    inputs = {"model": packed, "parent": language.model, "dataset": language.dataset, "samples": own}
    made = language.step("distill", QUICK | {"steps": 6}, **inputs)
    assert asked == [(one, number) for number in range(3) for one in (language.dataset.id, own.id)]
    assert made.inputs == {role: (artifact.id,) for role, artifact in inputs.items()}
    prints = contents(made, Calibration.file)["fingerprints"]
    assert len(prints) == len(contents(distilled(language, packed, steps=3), Calibration.file)["fingerprints"]) + 1


@pytest.mark.parametrize(("student", "stop"), [("packed", 3), ("packed", 4), ("dense", 3), ("dense", 4)])
def test_an_interrupted_run_makes_the_same_model(
    language: Lab, student: str, stop: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    config = QUICK | {"steps": 6}
    inputs = {"model": request.getfixturevalue(student), "parent": language.model, "dataset": language.dataset}
    whole = language.step("distill", config, **inputs)
    other: dict[str, Any] = {
        "store": Store(language.store.home.parent / f"stop-{student}-{stop}"),
        "progress": Progress(quiet=True),
    }
    config["checkpoint_every"] = 2
    uses: list[int] = []
    real = distill._use

    def counted(*args: Any) -> Any:
        if len(uses) == stop:
            uses.append(-1)
            raise KeyboardInterrupt
        uses.append(len(uses))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "_use", counted)
        with pytest.raises(KeyboardInterrupt):
            call("distill", config, inputs, **other)
        resumed = call("distill", config, inputs, **other)
    assert len(uses) - 1 < 6 + 2  # steps before the last checkpoint were not done again
    assert [value.equal(second) for (_, value), (_, second) in _vectors(whole, resumed)] != []
    assert all(value.equal(second) for (_, value), (_, second) in _vectors(whole, resumed))
    again = language.step("distill", config, **inputs)
    assert resumed.id == again.id
    assert contents(resumed, Distillation.file) == contents(whole, Distillation.file)


def _vectors(one: Artifact, other: Artifact) -> list[Any]:
    from safetensors.torch import load_file

    files = [sorted(artifact.path.glob("*.safetensors")) for artifact in (one, other)]
    pairs = [sorted(item for path in paths for item in load_file(path).items()) for paths in files]
    return list(zip(*pairs, strict=True))


def test_what_cannot_be_distilled(language: Lab, digits: Lab, packed: Artifact) -> None:
    inputs = {"model": packed, "parent": language.model, "dataset": language.dataset}
    for role, other in (("dataset", digits.dataset), ("samples", digits.dataset), ("parent", digits.model)):
        with pytest.raises(ConfigError, match=f"must all be for language, but {other.kind} {other.id[:12]} is for vis"):
            language.step("distill", QUICK, **inputs | {role: other})


def test_what_ran_before_does_not_decide_whether_memory_suffices(language: Lab, packed: Artifact) -> None:
    inputs = {"model": packed, "parent": language.model, "dataset": language.dataset}
    told = []
    for before in (0, 300_000_000):
        held = torch.ones(before, dtype=torch.uint8)
        with pytest.raises(BudgetError, match=r"takes about 2\.5 GB .* 2\.4 GB.*--effort normal") as failure:
            language.step("distill", QUICK | {"max_ram_bytes": 2_400_000_000}, **inputs)
        told.append(str(failure.value))
        del held
    assert told[0] == told[1]


def test_another_family_is_distilled(digits: Lab) -> None:
    model = digits.quantize(bits=2, group_size=64)
    made = distilled(digits, model, steps=60, batch_size=32)
    assert made.weight_bytes == model.weight_bytes
    assert divergence(digits, made, 60) < 0.6 * divergence(digits, model, 60)
    digits.step("quality", {}, model=made, dataset=digits.dataset, parent=digits.model)
    values = {item.metric: item.value for item in digits.store.evidence(made.id)}
    assert values["accuracy"] > 0.8 and values["accuracy_drop"] < 0.05


# ---- dense students --------------------------------------------------------------------------------------------------
def test_a_dense_student_comes_near_to_a_larger_parent(
    language: Lab, dense: Artifact, command: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("distill", dense.id, "--parent", language.model.id, "--data", language.dataset.id, "--steps", "60")
    code, out, err = command(*words, "--batch-size", 8, "--tokens", 64, "--home", language.store.home, "--json")
    assert code == 0, err
    made = language.store.get(json.loads(out)["id"])
    assert divergence(language, made) < 0.7 * divergence(language, dense)
    verify(made)
    assert made.weight_bytes == pytest.approx(dense.weight_bytes, rel=0.01) and not is_packed(made.path)
    assert made.inputs == {
        role: (one.id,) for role, one in (("model", dense), ("parent", language.model), ("dataset", language.dataset))
    }
    assert {Packing.file, LossIncrease.file}.isdisjoint(made.files) and "tokenizer.json" in made.files
    assert len(contents(made, Distillation.file)["losses"]) == 60
    assert contents(made, Calibration.file)["dataset"] == language.dataset.id
    before, after = dict(read_stored(dense.path)), dict(read_stored(made.path))
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: after[name].dtype for name in after}
    assert not any(after[name].equal(tensor) for name, tensor in before.items() if tensor.dim() > 1)
    language.step("quality", {"context": 64}, model=made, dataset=language.dataset, parent=language.model)


def test_a_rate_left_out_is_resolved_by_the_student_and_recorded(
    language: Lab, packed: Artifact, dense: Artifact
) -> None:
    config = {"batch_size": 2, "tokens": 64, "steps": 1}
    for model, rate in ((packed, 7e-3), (dense, 1e-2)):
        inputs = {"model": model, "parent": language.model, "dataset": language.dataset}
        made = language.step("distill", config, **inputs)
        assert made.config["learning_rate"] == rate
        assert language.step("distill", config | {"learning_rate": rate}, **inputs).id == made.id


def test_a_packed_student_may_be_smaller_than_its_parent(language: Lab, dense: Artifact) -> None:
    calibration = language.step("calibrate", {"examples": 16, "tokens": 64}, model=dense, dataset=language.dataset)
    model = language.step("quantize", {"bits": 4, "group_size": 32}, model=dense, calibration=calibration)
    made = distilled(language, model, steps=40, learning_rate=6e-2)
    assert made.weight_bytes == model.weight_bytes
    assert divergence(language, made) < divergence(language, model)


def test_a_student_that_answers_otherwise_is_refused(language: Lab, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", steps=1, vocab_size=352, **SMALL)
    model = language.step("pull", {"source": str(other)})
    with pytest.raises(ConfigError, match=r"vocab_size is 352 in model .* and 320 in its parent .*; take a model with"):
        distilled(language, model, steps=1)
    folder = write_model(tmp_path / "words", steps=1, **SMALL)
    words = json.loads((folder / "tokenizer.json").read_text())
    known = words["model"]["vocab"]
    words["model"]["vocab"] = {name: number ^ 1 if number > 1 else number for name, number in known.items()}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="different tokens; take a model with the parent's tokenizer"):
        distilled(language, language.step("pull", {"source": str(folder)}), steps=1)


def test_a_dense_classifier_is_distilled(digits: Lab, tmp_path: Path) -> None:
    training = {"size": 1, "steps": 2, "batch_size": 32, "warmup_steps": 2}
    student = digits.step("train", training, seed=3, dataset=digits.dataset)
    made = distilled(digits, student, steps=40, batch_size=16, learning_rate=1e-2)
    assert divergence(digits, made, 30) < 0.8 * divergence(digits, student, 30)
    other = Inception(InceptionConfig(1, classes=7))
    get_task("vision").save(other, tmp_path / "seven")
    with pytest.raises(ConfigError, match=r"classes is 7 in model .* and 10 in its parent"):
        distilled(digits, digits.step("pull", {"source": str(tmp_path / "seven")}), steps=1)


def test_a_dense_encoder_is_distilled(language: Lab, tmp_path: Path) -> None:
    pulled = [
        language.step("pull", {"source": str(write_encoder(tmp_path / f"{seed}", seed, **changes))})
        for seed, changes in ((0, {}), (1, {"num_hidden_layers": 1}), (2, {"hidden_size": 16}))
    ]
    lab = Lab(language.store, pulled[0], language.dataset)
    made = lab.step("distill", {"batch_size": 8, "steps": 30}, model=pulled[1], parent=lab.model, dataset=lab.dataset)
    assert divergence(lab, made) < 0.8 * divergence(lab, pulled[1])
    with pytest.raises(ConfigError, match="hidden_size is 16 in model"):
        lab.step("distill", {"steps": 1}, model=pulled[2], parent=lab.model, dataset=lab.dataset)
