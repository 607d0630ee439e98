"""The steps `quality` and `speed`: evidence about the right artifact, never on calibration data."""

from __future__ import annotations

import json

import pytest
from language_samples import text, write_causal, write_dataset
from test_vision import DIGITS, make_dataset

from gulliver.audit import measure, speed
from gulliver.audit.options import QualityOptions, SpeedOptions
from gulliver.audit.quality import run
from gulliver.core import machine
from gulliver.core.calibration import SeenRow
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, ConfigError, DataError, GulliverError
from gulliver.core.evidence.gate import Gate
from gulliver.core.overlap import fingerprints, remember
from gulliver.core.records import EXAMPLES, Calibration, QualityReport, SpeedReport
from gulliver.core.store.artifact import canonical_json, create, verify
from gulliver.nets.weights import unfilled
from gulliver.pipeline import steps
from gulliver.pipeline.call import call, meant
from gulliver.runtime.decode import native_reason
from gulliver.tasks import get_task
from gulliver.tasks.encoder.task import different
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
    stamp = file.stat().st_mtime_ns
    again = task.score(empty[0], language.dataset, empty[1], folder=packed.path, options=options, kept=kept)
    assert again == found and file.stat().st_mtime_ns == stamp, "it is read, not made again"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)  # a damaged file is not believed
    again = task.score(empty[0], language.dataset, empty[1], folder=packed.path, options=options, kept=kept)
    assert again == found and file.stat().st_mtime_ns != stamp


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


def remembered(train, name="calibrated"):
    """The record of a model that was calibrated on a text."""
    seen = remember(get_task("language").phrases({"text": train}))
    return Calibration(dataset=name, fingerprints=(), seen=(SeenRow.of(seen),)).model_dump_json().encode()


@pytest.mark.parametrize(
    "change", [str.upper, lambda text: text.replace(" ", "\n"), lambda text: text.replace(".", "")]
)
def test_text_that_was_seen_is_not_measured_on_in_another_form(store, ctx, dataset, change):
    """No line of it has 200 characters; an older model, which remembers fingerprints alone, is judged by those."""
    train = text(600, 5)
    other = write_dataset(store.artifacts_folder, [text(100, 1)], [change(train[4000:9000])])
    seen, older = add_model(store, calibration=remembered(train)), add_model(store, calibration=listed(train))
    for model in (seen, add_model(store, parents=[seen.id], note="distilled")):
        with pytest.raises(DataError, match=f"{seen.id[:12]} was calibrated on text of the eval part"):
            run(SMALL, {"model": model, "dataset": other}, ctx)
        assert store.evidence(model.id) == []
    run(SMALL, {"model": seen, "dataset": dataset}, ctx)
    run(SMALL, {"model": older, "dataset": other}, ctx)


def test_a_window_that_repeats_is_one_observation(store, ctx):
    whole, model = text(300, 7), add_model(store)
    window = whole[:64]

    def measure(held_out):
        data = write_dataset(store.artifacts_folder, [text(100, 1)], [held_out])
        cfg = QualityOptions(family={"windows": 4, "context": 64, "questions": 0})
        report = QualityReport.of(run(cfg, {"model": model, "dataset": data}, ctx))
        return next(item for item in report.evidence if item.metric == "perplexity")

    with pytest.raises(DataError, match=r"repeats one window of 64 tokens 20 times, which is one observation"):
        measure(window * 20)
    with pytest.raises(DataError, match="which is one observation"):
        measure(f"{window[13:]}{window * 20}")
    few = measure(window * 3 + whole[64:128] + window * 9 + whole[128:192] + window * 9)
    assert few.n == 3 and few.detail["repeats"] == 20
    assert measure(whole).n == 4 and "repeats" not in measure(whole).detail
    once = measure(window + whole[64:192])
    assert (few.value, few.low, few.high) == pytest.approx((once.value, once.low, once.high), rel=1e-6)


def test_a_parent_that_reads_other_tokens_is_refused(store, ctx, dataset):
    model, parent = add_model(store), add_model(store, seed=1, note="parent")

    def with_tokenizer(change):
        with create(
            store.artifacts_folder, kind="model", task="language", step={"name": "pull", "version": 1}, config={}
        ) as writer:
            for name, path in parent.paths().items():
                body = path.read_bytes()
                (writer.path / name).write_bytes(change(json.loads(body)) if name == "tokenizer.json" else body)
            return writer.commit()

    def turned(body):
        names = sorted((name for name, number in body["model"]["vocab"].items() if number < 256))
        numbers = [body["model"]["vocab"][name] for name in names]
        body["model"]["vocab"] |= dict(zip(names, [*numbers[7:], *numbers[:7]], strict=True))
        return json.dumps(body).encode()

    with pytest.raises(ConfigError, match="turn the same text into different tokens"):
        run(SMALL, {"model": model, "dataset": dataset, "parent": with_tokenizer(turned)}, ctx)
    assert store.evidence(model.id) == []
    spaced = with_tokenizer(lambda body: json.dumps(body, indent=8).encode())  # another file, the same tokens
    run(SMALL, {"model": model, "dataset": dataset, "parent": spaced}, ctx)


def damage(artifact, name):
    """One bit of a file is another; its length is not."""
    content = bytearray((artifact.path / name).read_bytes())
    content[-1] ^= 1
    (artifact.path / name).write_bytes(content)


@pytest.mark.parametrize("step", ["quality", "speed", "export", "calibrate"])
@pytest.mark.parametrize("role", ["model", "parent", "dataset"])
def test_damaged_bytes_are_not_measured_nor_packed(store, quiet, dataset, step, role):
    model, parent = add_model(store), add_model(store, seed=1, note="parent")
    inputs = {"model": model, "dataset": dataset, "parent": parent}
    row = steps.find(step)
    inputs = {name: one for name, one in inputs.items() if name in (*row.needs, *row.optional)}
    if role not in inputs:
        return
    damage(inputs[role], EXAMPLES if role == "dataset" else "model.safetensors")
    config = {"quality": {"windows": 3, "context": 32}, "export": {"format": "safetensors"}}.get(step, {})
    before = len(store.artifacts())
    with pytest.raises(ArtifactError, match=r"differs; SHA-256 .* delete the folder and make or get it again"):
        call(step, config, inputs, store=store, progress=quiet)
    assert store.evidence(model.id) == [] and len(store.artifacts()) == before


def test_bytes_that_change_while_they_are_measured_leave_no_evidence(store, quiet, dataset, monkeypatch):
    model, kind = add_model(store), type(get_task("language"))
    honest = kind._score

    def swapped(self, *args, **options):
        damage(model, "model.safetensors")
        return honest(self, *args, **options)

    monkeypatch.setattr(kind, "_score", swapped)
    with pytest.raises(ArtifactError, match="was changed while it was read"):
        call(
            "quality", {"windows": 3, "context": 32}, {"model": model, "dataset": dataset}, store=store, progress=quiet
        )
    assert store.evidence(model.id) == []


def test_a_speed_is_measured_again_on_other_cores(store, quiet, monkeypatch):
    model, log = add_model(store), []

    def measured_here():
        call("speed", {"repeats": 2}, {"model": model}, store=store, progress=quiet, log=log)
        gate = Gate("decode_tokens_per_s", at_least=0)
        return gate.judge(store.evidence(model.id), model.id, meant(store, None))

    def fake(request):
        names = ("load_seconds", "load_ram_bytes", "peak_ram_bytes")
        found = {"backend": "avx2", "why": "", "native": native_reason() is None, "threads": machine.usable_cores()}
        return {**dict.fromkeys(names, 1.0), **found, "rates": {"decode_tokens_per_s": [5.0, 6.0]}}

    monkeypatch.setattr(speed, "in_fresh_process", fake)
    assert measured_here().passed and measured_here().passed
    assert [entry.reused for entry in log] == [False, True]
    gate, before = Gate("decode_tokens_per_s", at_least=0), store.evidence(model.id)
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    verdict = gate.judge(before, model.id, meant(store, None))
    assert verdict.outcome == "NO_DATA" and "64 cores" in verdict.reason
    assert measured_here().passed and not log[-1].reused
    assert {item.detail["threads"] for item in store.evidence(model.id)} == {64, before[0].detail["threads"]}


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


def test_an_image_or_a_line_that_repeats_is_one_observation(store, ctx, vision):
    model, data = vision
    rows = get_task("vision").rows(data.path, "eval")
    held_out = [{**row, "split": "eval"} for row in rows]
    train = [{**row, "split": "train"} for row in get_task("vision").rows(data.path, "train")]
    found = []
    for several in (held_out, [row for row in held_out for _ in range(5)], held_out[:1] * 9):
        copies = make_dataset(store.artifacts_folder, [*train, *several])
        if len(several) == 9:
            with pytest.raises(DataError, match="repeats one image 9 times"):
                run(QualityOptions(), {"model": model, "dataset": copies}, ctx)
            continue
        report = QualityReport.of(run(QualityOptions(), {"model": model, "dataset": copies}, ctx))
        found.append([(one.metric, one.n, one.low, one.high) for one in report.evidence if one.data_hash])
    assert found[0] == found[1] and found[0][0][1] == len(held_out)
    assert different(["A line.", "another", "a  LINE", "???", "???"]) == ["A line.", "another", "???"]


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
