"""The store, on SQLite and on a real PostgreSQL: prefixes, lineage, evidence and runs that stay, processes at once."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from artifact_samples import make
from postgres import postgres_server, postgres_url  # noqa: F401 - fixtures

from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, ConfigError, MissingExtra, StorageError
from gulliver.core.evidence.evidence import measured
from gulliver.core.progress import Progress
from gulliver.core.store import database, locks, migrations
from gulliver.core.store.artifact import Artifact, create
from gulliver.core.store.files import file_lock
from gulliver.core.store.store import Store

Opener = Callable[[], Store]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same home and database each time it is called."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else None
    return lambda: Store(tmp_path / "home", url)


def write(store: Store, data: bytes = b"w", **changes: Any) -> Artifact:
    return make(store.artifacts_folder, {"model.safetensors": data}, **{"inputs": {}, **changes})


# ---- artifacts ----------------------------------------------------------------------------------------------------
def test_an_artifact_is_found_by_id_and_by_prefix(store: Store) -> None:
    artifact = write(store)
    assert store.get(artifact.id) == store.get(artifact.id[:6]) == artifact
    for wrong in (artifact.id[:5], artifact.id.upper(), "../" * 4, "g" * 64, ""):
        with pytest.raises(ArtifactError, match="is not an artifact id"):
            store.get(wrong)
    absent = "0" * 64 if artifact.id[0] != "0" else "1" * 64
    with pytest.raises(ArtifactError, match="gulliver list"):
        store.get(absent)


def test_a_prefix_of_two_artifacts_is_refused(store: Store) -> None:
    for last in "01":
        (store.artifacts_folder / ("abcdef" + "0" * 57 + last)).mkdir()
    with pytest.raises(ArtifactError, match="fits 2 artifacts"):
        store.resolve("abcdef")


def test_damaged_artifacts_are_told_apart(store: Store) -> None:
    good, cut, moved = write(store, b"1"), write(store, b"22"), write(store, b"333")
    (cut.path / "model.safetensors").write_bytes(b"2")
    moved.path.rename(store.artifacts_folder / ("f" * 64))
    assert store.has(good.id)
    assert not store.has(cut.id) and not store.has(moved.id) and not store.has("f" * 64)
    assert {artifact.id for artifact in store.artifacts()} == {good.id, cut.id}
    (error,) = store.damaged()
    assert "was moved or changed" in str(error)


def test_artifacts_are_listed_oldest_first_and_unfinished_ones_not(store: Store) -> None:
    made = [write(store, bytes([number])) for number in range(4)]
    for order, artifact in enumerate(reversed(made)):
        os.utime(artifact.path / "gulliver.json", ns=(order, order))
    with create(
        store.artifacts_folder, kind="model", task="language", step={"name": "s", "version": 1}, config={}
    ) as writer:
        (writer.path / "half").write_bytes(b"x")
        assert store.artifacts() == made[::-1]


def test_lineage_goes_back_to_the_roots_once_each(store: Store) -> None:
    gone = "c" * 64
    root = write(store, b"root", inputs={"model": [gone]})
    left, right = (
        write(store, b"left", inputs={"model": [root.id]}),
        write(store, b"right", inputs={"parent": [root.id]}),
    )
    top = write(store, b"top", inputs={"models": [left.id, right.id]})
    lineage = store.lineage(top.id[:8])
    assert [row["id"] for row in lineage] == [top.id, left.id, right.id, root.id, gone]
    assert lineage[0] == {**top.manifest, "parents": [left.id, right.id]} and lineage[-1] == {
        "id": gone,
        "missing": True,
    }


def test_a_new_store_sweeps_what_a_killed_process_left(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from gulliver.core.store.artifact import create\n"
        "from gulliver.core.store.store import Store\n"
        "folder, step = Store(sys.argv[1]).artifacts_folder, {'name': 's', 'version': 1}\n"
        "kept = create(folder, kind='model', task='t', step=step, config={})\n"
        "w = kept.__enter__(); (w.path / 'half').write_bytes(b'x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL and len(list((tmp_path / "artifacts").iterdir())) == 1
    assert list(Store(tmp_path).artifacts_folder.iterdir()) == []


# ---- evidence and runs --------------------------------------------------------------------------------------------
def test_evidence_comes_back_as_it_was(reopen: Opener) -> None:
    artifact = write(reopen())
    items = [
        measured("perplexity", 20.77, low=20.1, high=21.4, n=24, seed=2**40, data_hash="d", detail={"a": [1, "é"]}),
        measured("perplexity_ratio", 0.1 + 0.2, low=-math.inf, high=math.inf, n=1),
        measured("kl_divergence", math.nan, n=3),
        measured("size_bytes", 2**52 + 1),
    ]
    items = [replace(item, artifact_id=artifact.id, parent_id="p", machine="m", command="c") for item in items]
    reopen().record(items)
    reopen().record([replace(items[0], artifact_id="e" * 64)])
    assert list(map(repr, reopen().evidence(artifact.id))) == list(map(repr, items))
    assert len(reopen().evidence("e" * 64)) == 1 and reopen().evidence("d" * 64) == []


def test_evidence_about_no_artifact_is_refused_as_a_whole(reopen: Opener) -> None:
    store = reopen()
    good = replace(measured("accuracy", 0.5), artifact_id="a" * 64)
    for wrong in ("", "a" * 12):
        with pytest.raises(ArtifactError, match="64 hex digits"):
            store.record([good, replace(good, artifact_id=wrong)])
    with pytest.raises(ConfigError, match="JSON"):
        store.record([good, replace(good, detail={"x": math.nan})])
    assert store.evidence("a" * 64) == []
    store.record([])


def test_what_was_recorded_cannot_be_changed(reopen: Opener) -> None:
    store = reopen()
    store.record([replace(measured("accuracy", 0.5), artifact_id="a" * 64)])
    store.finish_run("k", "pull", {}, {}, "a" * 64, 1.0, 1)
    for statement in ("UPDATE evidence SET value = 1", "DELETE FROM evidence", "UPDATE runs SET seconds = 0"):
        with pytest.raises(sqlalchemy.exc.DBAPIError, match="append-only"), store._engine.begin() as connection:
            connection.exec_driver_sql(statement)
    assert store.evidence("a" * 64)[0].value == 0.5 and store.runs()[0].seconds == 1.0


COPIED = "(id, recorded_at, metric, unit, direction, n, seed, data_hash, artifact_id, machine, command, detail, chain)"
AS_IT_WAS = f"INSERT INTO evidence {COPIED} SELECT {COPIED[1:-1]} FROM evidence WHERE id = 2"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE evidence SET value = 1 WHERE id = 3",
        "UPDATE runs SET id = 9",
        "DELETE FROM runs",
        "DELETE FROM schema_history",
        "UPDATE schema_history SET number = number + 10",
        f"{AS_IT_WAS} ON CONFLICT (id) DO UPDATE SET value = 0",
        f"{AS_IT_WAS} ON CONFLICT (id) DO NOTHING",
        AS_IT_WAS.replace("SELECT id", "SELECT -1"),
        AS_IT_WAS.replace("SELECT id", "SELECT 99").replace("detail, chain FROM", "detail, '' FROM"),
    ],
)
def test_no_statement_changes_the_past(reopen: Opener, statement: str) -> None:
    _refuses(_three_of_each(reopen()), statement)


@pytest.mark.parametrize(
    "statement",
    [
        AS_IT_WAS.replace("INSERT", "INSERT OR REPLACE"),
        AS_IT_WAS.replace("INSERT", "REPLACE"),
        AS_IT_WAS.replace("INSERT", "REPLACE").replace("id = 2", "id = 3"),
        AS_IT_WAS.replace("INSERT", "REPLACE").replace("SELECT id", "SELECT '2'"),
        AS_IT_WAS.replace("INSERT", "INSERT OR IGNORE"),
        "UPDATE OR REPLACE evidence SET id = 1 WHERE id = 2",
        "REPLACE INTO runs SELECT * FROM runs",
        "REPLACE INTO schema_history VALUES (1)",
    ],
)
@pytest.mark.parametrize("recursive", ["ON", "OFF"])
def test_sqlite_replaces_nothing(store: Store, statement: str, recursive: str) -> None:
    """INSERT OR REPLACE deletes what it replaces without asking the triggers on DELETE."""
    _refuses(_three_of_each(store), f"PRAGMA recursive_triggers={recursive}", statement)


@pytest.mark.postgres
@pytest.mark.parametrize(
    "statement",
    ["TRUNCATE evidence", "TRUNCATE runs CASCADE", "TRUNCATE schema_history", "MERGE INTO runs USING evidence e ON"
     " runs.id = e.id WHEN MATCHED THEN DELETE"],
)  # fmt: skip
def test_postgresql_truncates_nothing(tmp_path: Path, postgres_url: str, statement: str) -> None:  # noqa: F811
    store = _three_of_each(Store(tmp_path / "home", postgres_url))
    _refuses(store, statement)
    _refuses(store, "SET session_replication_role = replica", statement)


def _three_of_each(store: Store) -> Store:
    for number in range(3):
        store.record([replace(measured("accuracy", 0.5, seed=number), artifact_id="a" * 64)])
        store.finish_run(f"k{number}", "pull", {}, {}, "a" * 64, 1, 1)
    return store


def _refuses(store: Store, *statements: str) -> None:
    before = repr(store.evidence("a" * 64)), store.runs()
    with pytest.raises(sqlalchemy.exc.DBAPIError, match="append-only"), store._engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    assert (repr(store.evidence("a" * 64)), store.runs()) == before
    assert store.verify() == {"evidence": 3, "runs": 3}


def _unguarded(store: Store, *statements: str) -> None:
    """What one does who owns the database and takes its guards away first."""
    with store._engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").scalars().all()
            for name in names:
                connection.exec_driver_sql(f"DROP TRIGGER {name}")
        else:
            for table in ("evidence", "runs"):
                connection.exec_driver_sql(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE evidence SET value = 0.51 WHERE id = 2", "row 2 of evidence"),
        ("UPDATE evidence SET detail = '{\"a\":1}' WHERE id = 1", "row 1 of evidence"),
        ("UPDATE evidence SET parent_id = 'x' WHERE id = 3", "row 3 of evidence"),
        ("DELETE FROM evidence WHERE id = 1", "row 2 of evidence"),
        ("DELETE FROM runs WHERE id = 2", "row 3 of runs"),
        ("UPDATE runs SET seconds = 2.5 WHERE id = 3", "row 3 of runs"),
        ("UPDATE runs SET id = 10 WHERE id = 1", "row 2 of runs"),
        (AS_IT_WAS.replace("SELECT id", "SELECT 9"), "row 9 of evidence"),
    ],
)
def test_a_changed_past_is_seen(reopen: Opener, statement: str, named: str) -> None:
    store = _three_of_each(reopen())
    _unguarded(store, statement)
    with pytest.raises(StorageError, match=f"was changed: {named}"):
        store.verify()


def test_rows_cut_off_at_the_end_are_seen_on_sqlite(store: Store) -> None:
    _unguarded(_three_of_each(store), "DELETE FROM evidence WHERE id >= 2")
    with pytest.raises(StorageError, match="evidence ends with row 1, but row 3 was written once"):
        store.verify()


def test_what_an_older_gulliver_left_is_chained(reopen: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    known = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", known[:3])
    with reopen()._engine.begin() as connection:
        for _ in range(3):
            connection.exec_driver_sql(OLD_ROW)
    monkeypatch.setattr(migrations, "MIGRATIONS", known)
    store = reopen()
    assert store.verify() == {"evidence": 3, "runs": 0}
    with pytest.raises(sqlalchemy.exc.DBAPIError, match="append-only"), store._engine.begin() as connection:
        connection.exec_driver_sql(OLD_ROW)  # an older one that still runs
    with pytest.raises(sqlalchemy.exc.DBAPIError, match="append-only"), store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE evidence SET value = 1")


def test_runs_are_found_by_key_and_the_newest_counts(reopen: Opener) -> None:
    store = reopen()
    assert store.find_run("key") is None
    inputs = {"model": ["b" * 64], "models": ["c" * 64, "a" * 64]}
    store.finish_run("key", "quantize", {"bits": 4}, inputs, "a" * 64, 1.25, 2**40)
    store.finish_run("key", "quantize", {"bits": 4}, inputs, "c" * 64, 2, 5)
    store.finish_run("key", "quantize", {"bits": 4}, inputs, "d" * 64, 2, 2**40)
    newest, small = reopen().find_run("key"), reopen().find_run("key", 2**40 - 1)
    assert newest is not None and newest.artifact_id == "d" * 64 and newest.inputs == inputs
    assert small is not None and (small.artifact_id, small.peak_rss_bytes) == ("c" * 64, 5)
    assert store.find_run("key", 4) is None and store.find_run("other") is None
    first, second, _ = reopen().runs()
    assert (first.step, first.config, first.inputs) == ("quantize", {"bits": 4}, inputs)
    assert (first.artifact_id, first.seconds, first.peak_rss_bytes) == ("a" * 64, 1.25, 2**40)
    assert first.finished_at.endswith("+00:00") and second.key == "key"
    with pytest.raises(ArtifactError, match="that quantize made"):
        store.finish_run("key", "quantize", {}, {}, "abc", 1.0, 1)


def test_a_context_fills_in_what_a_step_need_not_know(store: Store) -> None:
    progress = Progress(quiet=True)
    ctx = Context(
        store,
        progress,
        store.work("k"),
        "calibrate",
        4,
        {"model": ["a" * 64]},
        seed=3,
        command="gulliver x",
        machine_name="m",
    )
    with ctx.writer(kind="report", task="vision", config={"n": 1, "max_ram_bytes": 10**9}) as writer:
        (writer.path / "report.json").write_text("{}")
        artifact = writer.commit()
    assert (artifact.seed, artifact.step) == (3, {"name": "calibrate", "version": 4})
    assert artifact.inputs == {"model": ("a" * 64,)}
    assert artifact.config == {"n": 1}  # what a run may take is no part of what it makes
    ctx.record([replace(measured("accuracy", 0.5), artifact_id=artifact.id)])
    (item,) = store.evidence(artifact.id)
    assert (item.machine, item.command) == ("m", "gulliver x") and ctx.recorded == {artifact.id}


OLD_ROW = (
    "INSERT INTO evidence (recorded_at, metric, value, low, high, unit, direction, n, seed, data_hash, artifact_id,"
    f" machine, command, detail) VALUES ('', 'accuracy', 0.5, 0.5, 0.5, 'fraction', 'higher', 1, 0, '', '{'a' * 64}',"
    " '', '', '{}')"
)
"""As a Gulliver of the first schema wrote it."""


# ---- schema -------------------------------------------------------------------------------------------------------
def test_migrations_apply_once_and_go_on_from_where_they_were(reopen: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    known = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", known[:1])
    old = reopen()
    with old._engine.begin() as connection:
        connection.exec_driver_sql(OLD_ROW)
    monkeypatch.setattr(migrations, "MIGRATIONS", known)
    new = reopen()
    assert len(new.evidence("a" * 64)) == 1 and new.runs() == []
    new.record([replace(measured("accuracy", 0.5), artifact_id="a" * 64)])
    new.verify()
    with new._engine.connect() as connection:
        numbers = connection.exec_driver_sql("SELECT number FROM schema_history ORDER BY number").scalars().all()
    assert list(numbers) == list(range(1, len(known) + 1))
    monkeypatch.setattr(migrations, "MIGRATIONS", known[:2])
    with pytest.raises(ConfigError, match="upgrade Gulliver"):
        reopen()


def test_a_migration_that_fails_leaves_nothing(reopen: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    known = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", (*known, ("CREATE TABLE half (id {row})", "CREATE NONSENSE")))
    with pytest.raises(sqlalchemy.exc.DBAPIError):
        reopen()
    monkeypatch.setattr(migrations, "MIGRATIONS", (*known, ("CREATE TABLE half (id {row})",)))
    assert reopen().runs() == []


def test_a_database_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in (
        ("nonsense", "is not a URL"),
        ("oracle9://host/name", "is not supported"),
        (f"sqlite:///{tmp_path}/no/such/folder/x.db", "cannot be opened"),
        ("sqlite://", "cannot be opened: give a file"),
        (f"postgresql://nobody@/none?host={tmp_path}", "cannot be opened"),
    ):
        with pytest.raises((ConfigError, StorageError), match=message):
            Store(tmp_path / "home", url)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r"gulliver\[postgres\]"):
        Store(tmp_path / "home", "postgresql://user@host/name")
    (tmp_path / "file").write_text("x")
    (tmp_path / "home" / "gulliver.db").write_bytes(b"not a database " * 100)
    with pytest.raises(StorageError, match=r"not a database.*doctor --repair"):
        Store(tmp_path / "home")
    with pytest.raises(ConfigError, match="give another with --home"):
        Store(tmp_path / "file")
    write(Store(tmp_path / "emptied"))
    (tmp_path / "emptied" / "gulliver.db").write_bytes(b"")
    with pytest.raises(StorageError, match=r"it is empty.*doctor --repair"):
        Store(tmp_path / "emptied")
    (tmp_path / "foreign").mkdir()
    other = sqlite3.connect(tmp_path / "foreign" / "gulliver.db")
    other.execute("CREATE TABLE moz_places (x)")
    other.close()
    with pytest.raises(StorageError, match=r"tables of another program \(moz_places\)"):
        Store(tmp_path / "foreign")


def test_damaged_pages_are_told(store: Store) -> None:
    _three_of_each(store)
    file = store.home / "gulliver.db"
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))
    with pytest.raises(StorageError, match=r"gulliver.db is damaged.*doctor --repair"):
        Store(store.home).runs()


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as error:
        Store(tmp_path / "home", f"postgresql://me:hunter2@/none?host={tmp_path}")
    assert "hunter2" not in str(error.value)


# ---- several processes --------------------------------------------------------------------------------------------
WORKER = """
import sys, time
from dataclasses import replace
from pathlib import Path
from gulliver.core.evidence.evidence import measured
from gulliver.core.store.artifact import create
from gulliver.core.store.store import Store
home, url, me, rounds = sys.argv[1], sys.argv[2] or None, int(sys.argv[3]), int(sys.argv[4])
(Path(home).parent / f"ready-{me}").touch()
while not (Path(home).parent / "go").exists():
    time.sleep(0.001)
store = Store(home, url)
for number in range(rounds):
    item = replace(measured("accuracy", 0.5, n=me, seed=number), artifact_id="a" * 64)
    store.record([item, replace(item, metric="accuracy_vs_baseline")])
    store.finish_run(f"{me}-{number}", "pull", {}, {}, "a" * 64, 1.0, 1)
    for config in ({"by": "all", "number": number}, {"by": me, "number": number}):
        step = {"name": "s", "version": 1}
        with create(store.artifacts_folder, kind="model", task="language", step=step, config=config) as writer:
            (writer.path / "model.safetensors").write_bytes(b"w" * 1000)
            writer.commit()
"""


def test_processes_that_open_a_new_home_at_once_lose_nothing(reopen: Opener, request: pytest.FixtureRequest) -> None:
    workers, rounds = 4, 6
    folder: Path = request.getfixturevalue("tmp_path")
    url = request.getfixturevalue("postgres_url") if "postgresql" in request.node.name else ""
    command = [sys.executable, "-W", "error", "-c", WORKER, str(folder / "home"), url]
    running = [subprocess.Popen([*command, str(me), str(rounds)]) for me in range(1, workers + 1)]
    while len(list(folder.glob("ready-*"))) < workers:
        assert all(process.poll() is None for process in running)
    (folder / "go").touch()
    assert [process.wait() for process in running] == [0] * workers
    store = Store(folder / "home", url or None)
    evidence = store.evidence("a" * 64)
    pairs = {(item.metric, item.n, item.seed) for item in evidence}
    assert len(evidence) == len(pairs) == 2 * workers * rounds
    for first, second in zip(evidence[::2], evidence[1::2], strict=True):
        assert (first.n, first.seed) == (second.n, second.seed)  # a record() is one transaction: nobody stands between
    assert len({run.key for run in store.runs()}) == len(store.runs()) == workers * rounds
    assert store.verify() == {"evidence": 2 * workers * rounds, "runs": workers * rounds}  # one chain, no fork
    assert len(store.artifacts()) == rounds + workers * rounds and store.damaged() == []
    assert all(store.has(artifact.id) for artifact in store.artifacts())
    assert len(list(store.artifacts_folder.iterdir())) == len(store.artifacts())


SLOW = {
    "sqlite": "INSERT INTO evidence (recorded_at, metric, unit, direction, n, seed, data_hash, artifact_id, machine,"
    " command, detail) WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 300000)"
    " SELECT '', '', '', '', MAX(x), 0, '', '', '', '', '' FROM c",
    "postgresql": "SELECT pg_sleep(0.2)",
}


@pytest.mark.parametrize("dialect", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def test_homes_that_share_a_new_database_migrate_it_once(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The first migration is made slow, so that every opener arrives while it runs."""
    known = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", ((*known[0], SLOW[dialect]), *known[1:]))
    shared = f"sqlite:///{tmp_path}/shared.db" if dialect == "sqlite" else request.getfixturevalue("postgres_url")
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda number: Store(tmp_path / f"home-{number}", shared), range(4)))
    stores[0].finish_run("k", "pull", {}, {}, "a" * 64, 1.0, 1)
    assert [store.runs()[0].artifact_id for store in stores] == ["a" * 64] * 4


def test_a_lock_excludes_and_dies_with_its_process(store: Store) -> None:
    held = pytest.raises(ConfigError, match="another process holds")
    with store.lock("key"), store.lock("other", timeout_s=0), held, store.lock("key", timeout_s=0.01):
        pass
    script = (
        "import os, signal, sys; from gulliver.core.store.store import Store\n"
        "Store(sys.argv[1]).lock('key').__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(store.home)], check=False).returncode == -signal.SIGKILL
    with store.lock("key", timeout_s=0):
        pass


HOLDS = """
import sys, time
from gulliver.core.store.store import Store
store = Store(sys.argv[1])
if sys.argv[2] == "database":
    connection = store._engine.connect().execution_options(gulliver_write=True)
    connection.begin()
else:
    held = store.lock("key")
    held.__enter__()
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("what", ["lock", "database"])
def test_a_stopped_process_that_holds_a_lock_is_named_and_given_up_on(
    what: str, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "STOPPED_S", 1.5)
    monkeypatch.setattr(locks, "SAY_AFTER_S", 0.5)
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(store.home), what], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(StorageError, match=rf"process {holder.pid} \(stopped\).*kill -CONT {holder.pid}"):
            if what == "lock":
                store.lock("key").__enter__()
            else:
                _three_of_each(store)
        assert f"waiting for process {holder.pid} (stopped)" in capsys.readouterr().err
        assert store.runs() == []  # reading waits for nobody
    finally:
        holder.kill()
        holder.communicate()
    with store.lock("key", timeout_s=5):
        assert len(_three_of_each(store).runs()) == 3


def test_the_lock_of_the_schema_holds_up_no_home_that_is_up_to_date(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SCHEMA_IDLE_S", 0.5)
    with file_lock(store.home / "gulliver.db.lock"):
        assert Store(store.home).runs() == []
    (tmp_path / "new").mkdir()
    with open(tmp_path / "new" / "gulliver.db.lock", "w") as other:
        holder = subprocess.Popen(
            [sys.executable, "-c", f"import fcntl, time; fcntl.flock({other.fileno()}, 2); print(1, flush=True);"
             " time.sleep(60)"], pass_fds=[other.fileno()], stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
            with pytest.raises(StorageError, match=f"process {holder.pid} .*then repeat the command"):
                Store(tmp_path / "new")
        finally:
            holder.kill()
            holder.communicate()


@pytest.mark.postgres
def test_the_advisory_lock_of_postgresql_is_not_waited_for_without_an_end(
    tmp_path: Path,
    postgres_url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store(tmp_path / "home", postgres_url)
    monkeypatch.setattr(database, "BUSY_S", 0.5)
    with database.write(store._engine), pytest.raises(StorageError, match=f"gulliver, process {os.getpid()} on "):
        _three_of_each(store)
    assert len(_three_of_each(store).runs()) == 3


@pytest.mark.postgres
def test_postgresql_that_refuses_says_what_to_do(
    tmp_path: Path,
    postgres_url: str,  # noqa: F811
) -> None:
    store = Store(tmp_path / "home", postgres_url)
    with store._engine.begin() as connection:
        connection.exec_driver_sql("DROP ROLE IF EXISTS reader")
        connection.exec_driver_sql("CREATE ROLE reader LOGIN")
        connection.exec_driver_sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    reader = Store(tmp_path / "home", postgres_url.replace("gulliver@", "reader@"))
    assert reader.runs() == []
    with pytest.raises(StorageError, match=r"may not be written.*permission denied"):
        _three_of_each(reader)
    for url in (postgres_url.replace("/test_", "/none_"), postgres_url.replace("gulliver@", "nobody@")):
        with pytest.raises(StorageError, match=r"cannot be opened.*does not exist.*check that it runs") as told:
            Store(tmp_path / "home", url)
        assert "\n" not in str(told.value)


def test_a_lock_excludes_threads_too(store: Store) -> None:
    total = 0

    def add() -> None:
        nonlocal total
        for _ in range(20):
            with store.lock("sum"):
                before = total
                threading.Event().wait(0.0005)
                total = before + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total == 80


def test_work_outlives_a_store_and_is_cleared(store: Store) -> None:
    (store.work("key") / "block-3").write_text("done")
    assert (Store(store.home).work("key") / "block-3").read_text() == "done"
    store.clear_work("key")
    assert list(store.work("key").iterdir()) == []
    for wrong in ("../x", "", "a/b", ".hidden"):
        with pytest.raises(AssertionError):
            store.work(wrong)
