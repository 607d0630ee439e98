"""The step `heal`: it brings a packed model nearer to its parent, in the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
from compress_samples import Lab, contents, divergence
from language_samples import write_dataset

from gulliver.core.errors import BudgetError, ConfigError
from gulliver.core.progress import Progress
from gulliver.core.records import Calibration, Distillation, LossIncrease, Packing
from gulliver.core.store.artifact import Artifact, verify
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call
from gulliver.runtime.packed import PackedTensor
from gulliver.runtime.reference import read_stored
from gulliver.tasks.language.task import LanguageTask
from gulliver.train import distill

RATES = {"learning_rate": 1.5e-2, "scale_rate": 3e-4, "vector_rate": 3e-4}
QUICK = {"batch_size": 8, "tokens": 64, "warmup_steps": 2, **RATES}


def healed(lab: Lab, model: Artifact, **config: Any) -> Artifact:
    options = QUICK | config
    if lab.model.task != "language":
        del options["tokens"]
    return lab.step("distill", options, model=model, parent=lab.model, dataset=lab.dataset)


@pytest.fixture(scope="module")
def packed(language: Lab) -> Artifact:
    return language.quantize(bits=3)


def test_healing_brings_a_model_nearer_to_its_parent(language: Lab, packed: Artifact) -> None:
    made = healed(language, packed, steps=30)
    before, after = divergence(language, packed), divergence(language, made)
    assert after < 0.85 * before
    losses = contents(made, Distillation.file)["losses"]
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
    verify(made)


def test_sizes_and_formats_stay(language: Lab, packed: Artifact) -> None:
    made = healed(language, packed, steps=30)
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
    made = healed(language, packed, steps=3, **tiny)
    before, after = divergence(language, packed), divergence(language, made)
    assert after == pytest.approx(before, rel=0.05)  # scales are cut into 8 bits once more


def test_rows_of_several_formats_heal(language: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from gulliver.compress import plan as planning

    monkeypatch.setattr(planning, "MIN_CLASS_ROWS", 8)
    monkeypatch.setattr(planning, "CLASSES", (1 / 8, 1 / 3, 1.0))
    for size_bytes in (47_000, 52_000, 58_000, 64_000):
        model = language.quantize(plan=language.plan(size_bytes, seed=1), seed=1)
        if any(isinstance(tensor, PackedTensor) and len(tensor.parts) > 1 for _, tensor in read_stored(model.path)):
            break
    else:
        pytest.fail("no plan gave a table parts of its own")
    made = healed(language, model, steps=12, learning_rate=5e-3)
    assert contents(made, Packing.file) == contents(model, Packing.file)
    assert divergence(language, made) < divergence(language, model)


def test_samples_take_their_turn(language: Lab, packed: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    own = write_dataset(language.store.artifacts_folder, ["a child counts the long rope for many words. " * 90], [])
    asked: list[tuple[str, int]] = []
    real = LanguageTask._batches

    def counted(self: Any, dataset: Artifact, split: str, batch_size: int, seed: int, step: int, *rest: Any, **d: Any):
        for number, batch in enumerate(real(self, dataset, split, batch_size, seed, step, *rest, **d), start=step):
            asked.append((dataset.id, number))
            yield batch

    monkeypatch.setattr(LanguageTask, "_batches", counted)
    inputs = {"model": packed, "parent": language.model, "dataset": language.dataset, "samples": own}
    made = language.step("distill", QUICK | {"steps": 6}, **inputs)
    assert asked == [(language.dataset.id, 0), *((own.id, n) for n in range(3)), (language.dataset.id, 1), (own.id, 3)]
    assert made.inputs == {role: (artifact.id,) for role, artifact in inputs.items()}
    prints = contents(made, Calibration.file)["fingerprints"]
    assert len(prints) == len(contents(healed(language, packed, steps=3), Calibration.file)["fingerprints"]) + 1


@pytest.mark.parametrize("stop", [3, 4])
def test_an_interrupted_run_makes_the_same_model(
    language: Lab, packed: Artifact, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QUICK | {"steps": 6}
    inputs = {"model": packed, "parent": language.model, "dataset": language.dataset}
    whole = language.step("distill", config, **inputs)
    other: dict[str, Any] = {
        "store": Store(language.store.home.parent / f"stop-{stop}"),
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


def test_what_cannot_be_healed(language: Lab, digits: Lab, packed: Artifact) -> None:
    with pytest.raises(ConfigError, match="no packed weights"):
        healed(language, language.model)
    inputs = {"model": packed, "parent": language.model, "dataset": digits.dataset}
    with pytest.raises(ConfigError, match="must all be for language"):
        language.step("distill", QUICK, **inputs)
    inputs = {"model": packed, "parent": language.model, "dataset": language.dataset}
    with pytest.raises(BudgetError, match="--effort normal"):
        call("distill", QUICK | {"max_ram_bytes": 10**9}, inputs, store=language.store, progress=Progress(quiet=True))


def test_another_family_heals(digits: Lab) -> None:
    model = digits.quantize(bits=2, group_size=64)
    made = healed(digits, model, steps=60, batch_size=32)
    assert made.weight_bytes == model.weight_bytes
    assert divergence(digits, made, 60) < 0.6 * divergence(digits, model, 60)
    digits.step("quality", {}, model=made, dataset=digits.dataset, parent=digits.model)
    values = {item.metric: item.value for item in digits.store.evidence(made.id)}
    assert values["accuracy"] > 0.8 and values["accuracy_drop"] < 0.05
