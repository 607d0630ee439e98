"""The steps `quality` and `speed`: evidence about the right artifact, never on calibration data."""

from __future__ import annotations

import json

import pytest
from language_samples import text, write_causal, write_dataset
from safetensors import SafetensorError
from test_vision import DIGITS, make_dataset

from gulliver.audit import measure, speed
from gulliver.audit.options import QualityOptions, SpeedOptions
from gulliver.audit.quality import run
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, ConfigError, DataError, GulliverError
from gulliver.core.overlap import fingerprints
from gulliver.core.records import Calibration, QualityReport, SpeedReport
from gulliver.core.store.artifact import canonical_json, create, verify
from gulliver.nets.weights import unfilled
from gulliver.pipeline import steps
from gulliver.runtime.decode import native_reason
from gulliver.tasks import get_task
from gulliver.tasks.language import outputs

PASSAGE = "the giant measures every island and the queen counts the lanterns. " * 4
SMALL = QualityOptions(family={"windows": 3, "context": 32})


@pytest.fixture
def ctx(store, quiet):
    return Context(
        store=store,
        progress=quiet,
        work=store.work("0" * 64),
        step="quality",
        command="gulliver audit m",
        machine_name="here",
    )


def add_model(store, *, calibration=None, parents=(), seed=0, note="a"):
    options = {
        "step": {"name": "quantize", "version": 1},
        "config": {"note": note},
        "inputs": {"model": parents} if parents else {},
    }
    with create(store.artifacts_folder, kind="model", task="language", **options) as writer:
        write_causal(writer.path, seed=seed)
        if calibration is not None:
            (writer.path / Calibration.file).write_bytes(calibration)
        return writer.commit()


def listed(passages):
    units = get_task("language").units({"text": passages})
    return canonical_json({"dataset": "d", "fingerprints": fingerprints(units)})


@pytest.fixture
def dataset(store):
    return write_dataset(store.artifacts_folder, [text(100, 1)], [f"{text(40, 2)}\n\n{PASSAGE}\n"])


def test_evidence_is_recorded_about_the_model(store, ctx, dataset):
    parent = add_model(store, note="parent")
    model = add_model(store, parents=[parent.id], seed=1)
    report = run(SMALL, {"model": model, "dataset": dataset, "parent": parent}, ctx)
    verify(report)
    recorded = {item.metric: item for item in store.evidence(model.id)}
    expected = get_task("language").score(
        get_task("language").load(model.path),
        dataset,
        get_task("language").load(parent.path),
        folder=model.path,
        options=get_task("language").chosen({"windows": 3, "context": 32}),
    )
    assert {item.metric: item.value for item in expected}.items() <= {k: v.value for k, v in recorded.items()}.items()
    assert recorded["size_bytes"].value == model.weight_bytes and recorded["size_ratio"].value == 1
    assert recorded["bits_per_weight"].value == pytest.approx(32, rel=0.1)
    assert all(item.artifact_id == model.id and item.parent_id == parent.id for item in recorded.values())
    assert all((item.machine, item.command) == ("here", "gulliver audit m") for item in recorded.values())
    assert store.evidence(parent.id) == []
    body = QualityReport.of(report)
    assert list(body.evidence) == store.evidence(model.id)
    assert (body.model, body.dataset, body.parent) == (model.id, dataset.id, parent.id)
    assert report.kind == "report" and ctx.recorded == {model.id}


def test_packed_weights_are_measured_a_block_at_a_time(language, monkeypatch):
    """A packed model without its weights in memory scores as the whole one; its parent's outputs are read again."""
    task, cfg = get_task("language"), {"windows": 3, "context": 32}
    packed = language.quantize(bits=4)
    models, options = (packed, language.model), task.chosen(cfg)
    whole = task.score(
        task.load(packed.path),
        language.dataset,
        task.load(language.model.path),
        folder=packed.path,
        options=options,
    )
    loaded = []
    monkeypatch.setattr(outputs, "load_network", lambda *args, **kwargs: loaded.append(args))
    kept = language.store.home / "kept"
    kept.mkdir()
    for _ in range(2):
        empty = [task.load(model.path, empty=True) for model in models]
        assert all(len(unfilled(network)) for network in empty)
        shares = []
        found = task.score(
            empty[0], language.dataset, empty[1], folder=packed.path, options=options, kept=kept, advance=shares.append
        )
        assert all(len(unfilled(network)) for network in empty) and not loaded
        assert shares == sorted(shares) and shares[-1] == 1
        for one, other in zip(whole, found, strict=True):
            assert one.metric == other.metric and other.value == pytest.approx(one.value, rel=0.02, abs=1e-3)
    (file,) = kept.iterdir()
    file.write_bytes(b"no outputs")  # is read, not made again
    with pytest.raises(SafetensorError):
        task.score(empty[0], language.dataset, empty[1], folder=packed.path, options=options, kept=kept)


def test_calibration_data_is_never_measured_on(store, ctx, dataset):
    model = add_model(store, calibration=listed(f"elsewhere\n\n{PASSAGE}"))
    with pytest.raises(DataError, match="the giant measures every island"):
        run(SMALL, {"model": model, "dataset": dataset}, ctx)
    distilled = add_model(store, parents=[model.id], note="distilled")
    with pytest.raises(DataError, match=model.id[:12]):
        run(SMALL, {"model": distilled, "dataset": dataset}, ctx)
    assert store.evidence(model.id) == store.evidence(distilled.id) == []
    other = add_model(store, calibration=listed(PASSAGE.replace("giant", "sailor")))
    run(SMALL, {"model": other, "dataset": dataset}, ctx)


@pytest.mark.parametrize(
    "content",
    [
        *(b"{", b"[]", b"{}"),
        *(b'{"dataset": "d"}', b'{"dataset": "d", "fingerprints": 3}', b'{"dataset": "d", "fingerprints": [1]}'),
    ],
)
def test_damaged_fingerprints_refuse(store, ctx, dataset, content):
    model = add_model(store, calibration=content)
    with pytest.raises(ArtifactError, match=Calibration.file):
        run(SMALL, {"model": model, "dataset": dataset}, ctx)


@pytest.fixture
def vision(store):
    task = get_task("vision")
    rows = [{**row, "split": split} for split in ("train", "eval") for row in list(task.rows(DIGITS, split))[::20]]
    with create(
        store.artifacts_folder, kind="model", task="vision", step={"name": "train", "version": 1}, config={}
    ) as writer:
        task.save(task.build(1), writer.path)
        model = writer.commit()
    return model, make_dataset(store.artifacts_folder, rows)


def test_another_family_is_measured_by_the_same_step(store, ctx, vision):
    model, data = vision
    run(QualityOptions(), {"model": model, "dataset": data, "parent": model}, ctx)
    recorded = {item.metric: item for item in store.evidence(model.id)}
    assert recorded["accuracy_drop"].value == 0 and recorded["size_ratio"].value == 1
    with pytest.raises(ConfigError, match=r"context|windows"):
        run(SMALL, {"model": model, "dataset": data}, ctx)


def test_families_are_not_mixed(store, ctx, dataset, vision):
    with pytest.raises(ConfigError, match="for vision"):
        run(SMALL, {"model": add_model(store), "dataset": vision[1]}, ctx)
    with pytest.raises(ConfigError, match="for vision"):
        run(SMALL, {"model": add_model(store), "dataset": dataset, "parent": vision[0]}, ctx)


# ---- speed --------------------------------------------------------------------------------------------------------
def test_speed_is_measured_in_a_process_of_its_own(store, ctx):
    model = add_model(store)
    report = speed.run(SpeedOptions(repeats=2), {"model": model}, ctx)
    recorded = {item.metric: item for item in store.evidence(model.id)}
    assert set(recorded) == {
        *("load_seconds", "load_ram_bytes", "peak_ram_bytes"),
        *("prefill_tokens_per_s", "decode_tokens_per_s"),
    }
    assert recorded["decode_tokens_per_s"].n == 2 and recorded["decode_tokens_per_s"].value > 0
    assert 0 < recorded["load_ram_bytes"].value <= recorded["peak_ram_bytes"].value
    detail = recorded["decode_tokens_per_s"].detail
    if native_reason() is None:
        assert detail["backend"] not in ("", "reference") and "native" in detail["why"]
    else:
        assert detail["backend"] == "reference" and native_reason() in detail["why"]
    assert steps.find("speed").version == 2, "the numbers of version 1 are the reference path's"
    body = json.loads(report.file(SpeedReport.file).read_text())
    assert len(body["evidence"]) == len(recorded) and body["model"] == model.id


def test_every_family_can_be_measured(vision):
    found = measure.measure(str(vision[0].path), "vision", 2)
    assert found["load_ram_bytes"] > 0 and found["streams"] == {}
    assert found["backend"] == "reference" and "by torch alone" in found["why"]
    assert all(len(rates) == 2 for rates in found["rates"].values())


def test_a_failing_process_says_why(tmp_path):
    with pytest.raises(GulliverError, match=r"no config\.json"):
        measure.in_fresh_process({"folder": str(tmp_path), "task": "language", "repeats": 2})
