"""Every record that crosses a stage: what is written reads back, what is wrong is refused by name, old files open."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gulliver.core import record as record_base
from gulliver.core.errors import ArtifactError
from gulliver.core.evidence.evidence import measured
from gulliver.core.evidence.gate import Gate
from gulliver.core.record import Record
from gulliver.core.records import (
    NOT_COPIED,
    RECORDS,
    Asked,
    BlockLoss,
    Calibration,
    Distillation,
    FitResult,
    HarnessReport,
    LossIncrease,
    Origin,
    PackedPart,
    PackedWeight,
    Packing,
    PartBits,
    PlainTensor,
    PlainTensors,
    Plan,
    PlannedPoint,
    Point,
    QualityReport,
    Sources,
    SpeedReport,
    SplitSource,
    StatisticsTable,
    TensorBits,
    Training,
    WeightRow,
)
from gulliver.runtime.packing import read_packing

ID = "0123456789abcdef" * 4
EVIDENCE = replace(measured("quality_loss", 0.03, low=0.02, high=float("inf"), n=8), artifact_id=ID)
PART = PartBits(rows=16, format="c4g64", bits_per_weight=4.4, size_bytes=700, loss_increase=0.25)
SAMPLES: dict[type[Record], Record] = {
    Sources: Sources(
        train=SplitSource(examples=3, files={"a.txt": ID}), eval=SplitSource(examples=1, files={"b ü.txt": ID})
    ),
    Origin: Origin(source="hf:a/b", license="MIT", original_format="GGUF Q4_1", original_bytes=9, bfloat16_bytes=20),
    Training: Training(losses=(3.5, 1.25, 1e-9)),
    Distillation: Distillation(losses=(0.5,)),
    Calibration: Calibration(dataset=ID, fingerprints=("0123456789abcdef",)),
    StatisticsTable: StatisticsTable(
        model=ID,
        weights={"a.weight": WeightRow(shape=(16, 64), block="a", uses=(("rows.safetensors", "moment:a", "rows:a"),))},
        blocks=("a", "norm"),
        sensitivity="gradient",
        examples=64,
    ),
    Plan: Plan(
        budget_bytes=1000,
        size_bytes=900,
        loss_increase=0.25,
        tensors=(TensorBits(name="a.weight", shape=(16, 64), size_bytes=700, parts=(PART,)),),
        blocks=(BlockLoss(name="a", loss_increase=0.25),),
        frontier=(PlannedPoint(size_bytes=900, loss_increase=0.25),),
    ),
    LossIncrease: LossIncrease(weights={"a.weight": 0.25}),
    PlainTensors: PlainTensors(share=0.1, tensors={"norm.weight": PlainTensor(size_bytes=2, reason="a vector")}),
    Packing: Packing(tensors={"a.weight": PackedWeight(shape=(16, 64), parts=(PackedPart(format="c4g64", rows=16),))}),
    HarnessReport: HarnessReport(model=ID, parent=ID, evidence=(EVIDENCE,)),
    QualityReport: QualityReport(model=ID, dataset=ID, parent=ID, evidence=(EVIDENCE,)),
    SpeedReport: SpeedReport(model=ID, evidence=(EVIDENCE,)),
    FitResult: FitResult(
        budget=Asked(size_bytes=1000, max_drop=0.05),
        effort="high",
        frontier=(Point(size_bytes=900, predicted_drop=0.04),),
        rounds=(Point(size_bytes=900, predicted_drop=0.04, measured_drop=0.03),),
        memory=((0.0, "calibrate", 10**9), (1.5, "plan", 2 * 10**9)),
        verdicts=(
            Gate("quality_loss", at_most=0.05).judge([EVIDENCE], ID),
            Gate("accuracy", at_least=0.9).judge([], ID),
        ),
        seconds=12.5,
        artifact_id=ID,
    ),
}
LOOP = pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)


def written(kind: type[Record], folder: Path) -> Any:
    SAMPLES[kind].write(folder)
    return json.loads((folder / kind.file).read_text(encoding="utf-8"))


def refused(kind: type[Record], content: bytes) -> str:
    with pytest.raises(ArtifactError) as refusal:
        kind.parse(content, kind.file)
    message = str(refusal.value)
    assert (
        message.startswith(kind.file) and message.endswith(kind.remedy) and len(message) < 1000 and "\n" not in message
    )
    return message


# ---- every record ----------------------------------------------------------------------------------------------------
def test_every_record_has_a_name_of_its_own_and_a_sample() -> None:
    names = [name for kind in RECORDS for name in (kind.file, kind.former) if name]
    assert len(set(names)) == len(names) and set(SAMPLES) == set(RECORDS)
    assert set(NOT_COPIED) <= set(names)


@LOOP
def test_what_is_written_reads_back(kind: type[Record], tmp_path: Path) -> None:
    written(kind, tmp_path)
    found = kind.read(tmp_path)
    assert found == SAMPLES[kind] and type(found) is kind
    first = (tmp_path / kind.file).read_bytes()
    found.write(tmp_path)
    assert (tmp_path / kind.file).read_bytes() == first and first.endswith(b"}\n")
    with pytest.raises(Exception, match="frozen"):
        setattr(found, next(iter(kind.model_fields)), None)


@LOOP
def test_an_unknown_key_is_refused_by_name(kind: type[Record], tmp_path: Path) -> None:
    body = written(kind, tmp_path)
    message = refused(kind, json.dumps({**body, "surplus": 1}).encode())
    assert "unknown key surplus" in message and kind.remedy in message


@LOOP
def test_a_required_key_that_is_missing_is_named(kind: type[Record], tmp_path: Path) -> None:
    body = written(kind, tmp_path)
    for name, field in kind.model_fields.items():
        if not field.is_required() or kind is LossIncrease:
            continue
        message = refused(kind, json.dumps({key: value for key, value in body.items() if key != name}).encode())
        assert f"{name} is missing" in message and kind.remedy in message


@LOOP
@pytest.mark.parametrize("value", [True, "7", -1, 1.5, {"a": []}, [[]], [None], None])
def test_a_value_of_another_type_is_refused_by_place(kind: type[Record], value: Any, tmp_path: Path) -> None:
    body = written(kind, tmp_path)
    for key, right in body.items():
        if value is None and not kind.model_fields[key].is_required():
            continue
        if type(value) is type(right) or {type(value), type(right)} <= {int, float}:
            continue
        assert key in refused(kind, json.dumps({**body, key: value}).encode())


@LOOP
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}',
     b'{"a": 123456789012345678901234567890}'],
)  # fmt: skip
def test_what_is_not_strict_json_is_refused(kind: type[Record], content: bytes) -> None:
    refused(kind, content)


@LOOP
def test_a_file_cut_anywhere_is_refused(kind: type[Record], tmp_path: Path) -> None:
    written(kind, tmp_path)
    content = (tmp_path / kind.file).read_bytes()
    for end in range(0, len(content) - 2, 7):
        refused(kind, content[:end])


@LOOP
def test_a_file_that_is_too_large_is_refused_unread(kind: type[Record], tmp_path: Path, monkeypatch: Any) -> None:
    written(kind, tmp_path)
    size = (tmp_path / kind.file).stat().st_size
    monkeypatch.setattr(kind, "max_bytes", size)
    assert kind.read(tmp_path) == SAMPLES[kind]
    monkeypatch.setattr(kind, "max_bytes", size - 1)
    monkeypatch.setattr(record_base, "read_json", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(ArtifactError, match=f"more than the {size - 1} bytes"):
        kind.read(tmp_path)


@LOOP
def test_a_missing_file_is_named(kind: type[Record], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{kind.file} cannot be read.*{kind.remedy}"):
        kind.read(tmp_path)


# ---- what is wrong inside --------------------------------------------------------------------------------------------
def _set(*path: Any) -> Callable[[Any], None]:
    *way, last, value = path

    def change(body: Any) -> None:
        for key in way:
            body = body[key]
        body[last] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        (Plan, _set("tensors", 0, "parts", 0, "format", "x9g1"), r"tensors\[0\].parts\[0\].format is 'x9g1'"),
        (Plan, _set("tensors", 0, "parts", 0, "rows", -1), r"rows is -1"),
        (Plan, _set("tensors", 0, "parts", 0, "rows", "16"), r"rows is '16'"),
        (Plan, _set("tensors", 0, "shape", "ab"), r"tensors\[0\].shape is 'ab'"),
        (Plan, _set("frontier", 0, {"size_bytes": 1}), r"frontier\[0\].loss_increase is missing"),
        (Plan, _set("tensors", 0, "more", 1), r"unknown key tensors\[0\].more"),
        (Calibration, _set("fingerprints", 0, "0123"), r"fingerprints\[0\] is '0123'"),
        (StatisticsTable, _set("weights", "a.weight", "block", "other"), "block 'other'"),
        (StatisticsTable, _set("weights", "a.weight", "uses", []), "uses"),
        (StatisticsTable, _set("weights", "a.weight", "uses", 0, ["a", "b"]), "uses"),
        (StatisticsTable, _set("format", 2), "format is 2"),
        (Packing, _set("tensors", "a.weight", "parts", 0, "rows", 15), r"\[15\] rows, the weight has 16"),
        (Packing, _set("format", 9), "format is 9"),
        (Sources, _set("train", "files", "a.txt", "zz"), "train.files"),
        (QualityReport, _set("evidence", 0, "metric", "perplexty"), "did you mean 'perplexity'"),
        (QualityReport, _set("evidence", 0, "n", "many"), r"evidence\[0\].n is 'many'"),
        (QualityReport, _set("evidence", 0, 3), r"evidence\[0\] is 3"),
        (FitResult, _set("verdicts", 0, "outcome", "MAYBE"), "MAYBE"),
        (FitResult, _set("verdicts", 0, "at_most", None), "exactly one of at_most and at_least"),
        (FitResult, _set("verdicts", 0, {"metric": "a"}), r"verdicts\[0\].outcome is missing"),
        (FitResult, _set("verdicts", 0, "evidence", 3), r"verdicts\[0\].evidence is 3"),
        (FitResult, _set("memory", 0, [1, "a"]), r"memory\[0\]"),
        (FitResult, _set("memory", 0, [True, "a", 1]), r"memory\[0\]\[0\] is True"),
        (FitResult, _set("budget", "size_bytes", "big"), "budget.size_bytes is 'big'"),
    ],
)  # fmt: skip
def test_the_place_of_a_fault_is_named(
    kind: type[Record], change: Callable[[Any], None], told: str, tmp_path: Path
) -> None:
    body = written(kind, tmp_path)
    change(body)
    (tmp_path / kind.file).write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match=told):
        kind.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        _set("tensors", "a.weight", "parts", 0, "rows", 15), _set("tensors", "a.weight", "parts", []),
        _set("tensors", "a.weight", "parts", 0, "format", "zip"), _set("tensors", "a.weight", "shape", [16]),
        _set("tensors", "a.weight", "shape", [16, 0]), _set("tensors", "a.weight", "shape", [16.0, 64]),
        _set("tensors", "a.weight", "parts", 0, "rows", True), _set("tensors", "a.weight", "more", 1),
        _set("tensors", "a.weight", "inputs", 2), _set("tensors", "a.weight", "inputs", 0),
        _set("tensors", 3), _set("format", True), _set("format", 2), _set("tensors", "a.weight", "parts", 0, "n", 1),
    ],
)  # fmt: skip
def test_both_readers_of_packing_refuse_alike(change: Callable[[Any], None], tmp_path: Path) -> None:
    body = written(Packing, tmp_path)
    found = read_packing(tmp_path)["a.weight"]
    assert found.shape == (16, 64) and [(fmt.name, rows) for fmt, rows in found.parts] == [("c4g64", 16)]
    change(body)
    (tmp_path / Packing.file).write_text(json.dumps(body))
    for read in (Packing.read, read_packing):
        with pytest.raises(ArtifactError):
            read(tmp_path)


# ---- files of earlier versions ---------------------------------------------------------------------------------------
def test_files_of_earlier_versions_open(tmp_path: Path) -> None:
    part = {"rows": 16, "format": "c4g64", "bytes": 700, "damage": 0.25, "bits_per_weight": 4.4}
    old: dict[str, Any] = {
        "plan.json": {
            "budget_bytes": 1000,
            "size_bytes": 900,
            "damage": 0.25,
            "tensors": [{"name": "a.weight", "shape": [16, 64], "bytes": 700, "parts": [part]}],
            "blocks": [{"name": "a", "damage": 0.25}],
            "menu": [{"size_bytes": 900, "damage": 0.25}],
        },
        "damage.json": {"a.weight": 0.25},
        "calibration.json": {"dataset": ID, "paragraph_sha256_16": ["0123456789abcdef"]},
        "origin.json": {"license": "MIT", "source": "catalog:a"},
        "fit.json": {
            "budget": {"size_bytes": 1000, "max_ram_bytes": None, "min_tokens_per_s": None, "max_drop": None},
            "effort": "fast",
            "frontier": [{"size_bytes": 900, "predicted_drop": 0.04}],
            "rounds": [],
            "memory": [[0.5, "plan", 10]],
            "verdicts": [],
            "seconds": 1.5,
        },
    }
    statistics = SAMPLES[StatisticsTable].model_dump(mode="json")
    statistics["weights"]["a.weight"]["views"] = statistics["weights"]["a.weight"].pop("uses")
    for name, body in {**old, "statistics.json": statistics}.items():
        (tmp_path / name).write_text(json.dumps(body))
    for kind in (Plan, LossIncrease, StatisticsTable):
        assert kind.read(tmp_path) == SAMPLES[kind]
    assert Calibration.read(tmp_path).fingerprints == ("0123456789abcdef",)
    assert Origin.read(tmp_path).original_bytes is None
    assert FitResult.read(tmp_path).effort == "fast"


def test_reading_a_record_imports_no_torch() -> None:
    code = "import sys, gulliver.core.records; assert not {'torch', 'scipy', 'sqlalchemy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
