"""A home whose database is damaged or gone: what a repair keeps, enters again and marks, and what it leaves alone."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from artifact_samples import make

import gulliver
from gulliver.core.errors import ConfigError, StorageError
from gulliver.core.evidence.evidence import Evidence, measured
from gulliver.core.evidence.gate import Gate
from gulliver.core.records import SpeedReport
from gulliver.core.repair import repair
from gulliver.core.store import migrations
from gulliver.core.store.artifact import Artifact, write_annotation
from gulliver.core.store.database import open_database
from gulliver.core.store.store import Store

Damage = Callable[[Path], object]


def _cut_pages(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))


def _spoil_index(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'evidence_by_artifact'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    data = bytearray(file.read_bytes())
    data[(page - 1) * size : page * size] = b"\xa5" * size
    file.write_bytes(data)


DAMAGES = [
    lambda file: file.write_bytes(b"not a database " * 100),
    lambda file: file.write_bytes(b""),
    _cut_pages,
    lambda file: file.write_bytes(file.read_bytes()[:5000]),
]


@pytest.fixture
def measured_home(store: Store) -> tuple[Store, Artifact, list[Evidence]]:
    """A model with a card's evidence.json, and a report of its speed, as the steps leave them; both recorded."""
    model = make(store.artifacts_folder, inputs={})
    items = [replace(measured("accuracy", 0.5, low=0.4, high=0.6, n=9), artifact_id=model.id, machine="m")]
    speed = replace(measured("decode_tokens_per_s", 40.5, n=5), artifact_id=model.id)
    body = {"format": 1, "artifact_id": model.id, "evidence": [item.to_json() for item in items]}
    write_annotation(model, "evidence.json", json.dumps(body))
    report = SpeedReport(model=model.id, evidence=(speed,)).model_dump(mode="json")
    content = {"speed.json": json.dumps(report).encode()}
    make(
        store.artifacts_folder,
        content,
        kind="report",
        inputs={"model": [model.id]},
        step={"name": "speed", "version": 1},
    )
    store.record([*items, replace(speed, machine="m", command="c")])
    store.finish_run("k", "speed", {}, {}, model.id, 1.0, 1)
    return store, model, [*items, speed]


@pytest.mark.parametrize("damage", DAMAGES)
def test_evidence_comes_back_from_the_folders_marked(
    damage: Damage, measured_home: tuple[Store, Artifact, list[Evidence]]
) -> None:
    store, model, items = measured_home
    file = store.home / "gulliver.db"
    damage(file)
    broken = file.read_bytes()
    with pytest.raises(StorageError, match="doctor --repair"):
        Store(store.home).runs()
    done = gulliver.repair(store.home)
    assert done.aside is not None and done.aside.read_bytes() == broken and "damaged" in done.aside.name
    assert (done.entered, done.artifacts, done.unreadable) == (2, 2, ())
    found = Store(store.home).evidence(model.id)
    assert [(item.metric, item.value, item.low, item.high, item.n) for item in found] == [
        (item.metric, item.value, item.low, item.high, item.n) for item in items
    ]
    assert all(item.elsewhere for item in found)
    assert gulliver.verify_home(store.home) == {"evidence": 2, "runs": 0, "artifacts": 2}
    verdict = Gate("accuracy", at_least=0.1).judge(found, model.id)
    assert verdict.outcome == "NO_DATA" and "measured elsewhere" in verdict.reason
    again = repair(store.home)
    assert (again.aside, again.entered) == (None, 0)


def test_a_database_that_is_gone_is_made_anew(measured_home: tuple[Store, Artifact, list[Evidence]]) -> None:
    store, model, _ = measured_home
    (store.home / "gulliver.db").unlink()
    assert Store(store.home).evidence(model.id) == []  # an ordinary command came first
    done = repair(store.home)
    assert (done.aside, done.entered) == (None, 2)
    assert len(Store(store.home).evidence(model.id)) == 2


def test_rows_that_can_be_read_and_fit_are_taken_over(
    measured_home: tuple[Store, Artifact, list[Evidence]], tmp_path: Path
) -> None:
    """The index is damaged, the rows are not: they keep their chain, and are not marked."""
    store, model, _ = measured_home
    file = store.home / "gulliver.db"
    before = store.evidence(model.id)
    _spoil_index(file)
    done = repair(store.home)
    assert (done.kept, done.entered) == (3, 0) and done.aside is not None
    assert Store(store.home).evidence(model.id) == before and not before[0].elsewhere
    assert Store(store.home).runs() == store.runs()


def test_what_is_whole_is_left_alone(measured_home: tuple[Store, Artifact, list[Evidence]]) -> None:
    store, model, _ = measured_home
    before = store.evidence(model.id)
    done = repair(store.home)
    assert (done.aside, done.kept, done.entered, done.reason) == (None, 0, 0, "")
    assert store.evidence(model.id) == before


def test_a_folder_can_enter_no_evidence_about_others_and_none_that_is_wrong(store: Store) -> None:
    one, two = make(store.artifacts_folder, inputs={}), make(store.artifacts_folder, {"a": b"b"}, inputs={})
    foreign = replace(measured("accuracy", 0.9), artifact_id=two.id).to_json()
    write_annotation(one, "evidence.json", json.dumps({"format": 1, "artifact_id": two.id, "evidence": [foreign]}))
    for text in ("[]", '{"evidence": 3}', '{"evidence": [{"metric": "accuracy"}]}', "\xff", "{" * 2000):
        write_annotation(two, "evidence.json", text)
        assert repair(store.home).entered == 0
    assert store.evidence(two.id) == []


def test_the_command_says_what_was_done(
    measured_home: tuple[Store, Artifact, list[Evidence]], command: Callable[..., tuple[int, str, str]]
) -> None:
    store, model, _ = measured_home
    (store.home / "gulliver.db").write_bytes(b"not a database " * 100)
    for words in (("list",), ("show", model.id), ("verify",)):
        code, out, err = command(*words)
        assert (code, out, err.count("\n")) == (2, "", 1) and "`gulliver doctor --repair`" in err
    code, out, _ = command("doctor", "--repair")
    assert code == 0 and "gulliver.db.damaged-" in out and "2 pieces of evidence entered again" in out
    assert "accuracy, measured elsewhere" in command("show", model.id)[1]
    code, out, _ = command("verify", "--json")
    assert code == 0 and json.loads(out) == {
        "home": str(store.home), "evidence": 2, "runs": 0, "artifacts": 2, "verified": True
    }  # fmt: skip


def test_verify_of_a_home_names_the_first_row_and_the_first_file(
    measured_home: tuple[Store, Artifact, list[Evidence]], command: Callable[..., tuple[int, str, str]]
) -> None:
    store, model, _ = measured_home
    (model.path / "model.safetensors").write_bytes(b"x" * 100)
    code, _, err = command("verify")
    assert code == 2 and "model.safetensors differs" in err
    with sqlite3.connect(store.home / "gulliver.db") as connection:
        connection.execute("DROP TRIGGER evidence_no_update")
        connection.execute("UPDATE evidence SET value = 0.59 WHERE id = 1")
    connection.close()
    code, _, err = command("verify")
    assert code == 2 and f"row 1 of evidence (accuracy of {model.id[:12]}) does not fit" in err


def test_a_newer_database_is_not_repaired(store: Store) -> None:
    with store._engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO schema_history VALUES (99)")
    with pytest.raises(ConfigError, match="upgrade Gulliver"):
        repair(store.home)


@pytest.mark.parametrize("step", ["gulliver.core.store.chain.append", "os.replace"])
def test_a_repair_that_is_cut_short_can_be_repeated(
    step: str, measured_home: tuple[Store, Artifact, list[Evidence]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, model, _ = measured_home
    file = store.home / "gulliver.db"
    _spoil_index(file)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step, dies)
        repair(store.home)
    assert not list(store.home.glob("*.tmp-*"))
    with pytest.raises(StorageError, match="doctor --repair"):
        Store(store.home).verify()
    assert repair(store.home).kept == 3
    assert [item.metric for item in Store(store.home).evidence(model.id)] == ["accuracy", "decode_tokens_per_s"]


def test_rows_of_an_older_gulliver_are_taken_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows have no chain; an index that leads nowhere is the damage."""
    file = store.home / "gulliver.db"
    for name in ("", "-wal", "-shm"):
        file.with_name(f"gulliver.db{name}").unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:3])
        with open_database(store.home, None).begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO runs (finished_at, key, step, config, inputs, artifact_id, seconds, peak_rss_bytes)"
                " VALUES ('2026-01-01T00:00:00Z', 'k', 'speed', '{}', '{}', 'a', 1.5, 7)"
            )
    _spoil_index(file)
    done = repair(store.home)
    assert (done.kept, len(Store(store.home).runs())) == (1, 1) and Store(store.home).verify()["runs"] == 1
