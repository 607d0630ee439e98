"""A home whose database is damaged or gone is restored from what its artifacts hold: `gulliver doctor --repair`.

The damaged database is kept beside the new one. Its rows are taken over as long as each fits the one before (see
store/chain.py); evidence that is then missing and lies in the folders of artifacts is entered again, marked as measured
elsewhere, since nothing shows that it was recorded in this home.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.evidence.evidence import ELSEWHERE, Evidence
from gulliver.core.records import HarnessReport, QualityReport, SpeedReport
from gulliver.core.store import chain
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.database import DATABASE, SUFFIXES, DamagedDatabase, open_database, read, write
from gulliver.core.store.files import file_lock, hash_file, sync_folder, unfinished_folder
from gulliver.core.store.manifest import EVIDENCE, canonical_json, read_json
from gulliver.core.store.store import Store, home_folder

MAX_EVIDENCE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Repaired:
    """What a repair did. `aside` is where the damaged database lies now, None where it was whole, and `reason` what was

    wrong with it. `kept` counts the rows that were taken over from it, `entered` the evidence that was entered again
    from the artifacts' folders; `unreadable` says which artifacts cannot be read.
    """

    home: Path
    aside: Path | None
    reason: str
    kept: int
    entered: int
    artifacts: int
    unreadable: tuple[str, ...]


def repair(home: Path | str | None = None, database_url: str | None = None) -> Repaired:
    """Restore the database of a home. What is whole is left as it is, so a second repair changes nothing.

    StorageError when the database is locked, or PostgreSQL cannot be reached or is damaged (restore its backup).
    """
    folder = home_folder(home)
    aside, reason, kept = None, "", 0
    if database_url is None:
        folder.mkdir(parents=True, exist_ok=True)
        reason = _damage(folder)
        if reason:
            aside, kept = _begin_again(folder)
    store = Store(folder, database_url)
    entered = _enter(store)
    unreadable = tuple(str(error) for error in store.damaged())
    return Repaired(folder, aside, reason, kept, entered, len(store.artifacts()), unreadable)


def _damage(home: Path) -> str:
    """What is wrong with the SQLite database of a home; "" when nothing is, or there is none."""
    if not (home / DATABASE).exists():
        return ""
    try:
        with read(open_database(home, None)) as connection:
            said = str(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar())
    except DamagedDatabase as failure:
        return str(failure).partition(";")[0]
    return "" if said == "ok" else f"the database {home / DATABASE} is damaged ({' '.join(said.split())[:200]})"


def _begin_again(home: Path) -> tuple[Path, int]:
    """Keep a copy of the damaged database, and put one with its rows that fit in its place: (the copy, how many rows).

    The new one is complete before it takes the name, so a repair that is killed can be repeated.
    """
    aside = home / f"{DATABASE}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    kept = 0
    with file_lock(home / f"{DATABASE}.lock"), unfinished_folder(home / f"{DATABASE}.repair") as scratch:
        for suffix in SUFFIXES:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(home / f"{DATABASE}{suffix}", scratch / f"{aside.name}{suffix}")
        fresh = open_database(scratch, None)
        with write(fresh) as connection:
            for table in chain.TABLES:
                rows = list(_whole_rows(home / DATABASE, table))
                if rows:
                    chain.append(connection, table, rows)
                kept += len(rows)
        for suffix in SUFFIXES:
            with contextlib.suppress(FileNotFoundError):
                (scratch / f"{aside.name}{suffix}").rename(f"{aside}{suffix}")
        for suffix in SUFFIXES[1:]:  # SQLite must not find the old log beside the new database
            (home / f"{DATABASE}{suffix}").unlink(missing_ok=True)
        os.replace(scratch / DATABASE, home / DATABASE)
        sync_folder(home)
    return aside, kept


def _whole_rows(database: Path, table: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a damaged database from the first one on, until one cannot be read or does not fit.

    What an older Gulliver wrote is not chained: each row that can be read is taken.
    """
    engine = create_engine(f"sqlite:///{database}", poolclass=NullPool)
    with contextlib.suppress(DBAPIError, sqlite3.Error), engine.connect() as connection:
        there = {row.name for row in connection.exec_driver_sql(f"PRAGMA table_info({table})")}
        if "chain" not in there:
            columns = chain.TABLES[table]
            found = connection.execute(text(f"SELECT {', '.join(columns)} FROM {table} ORDER BY id"))
            yield from (dict(zip(columns, values, strict=True)) for values in found)
            return
        for _, _, row, fits in chain.rows_in_order(connection, table):
            if not fits:
                return
            yield row


def _enter(store: Store) -> int:
    """Enter the evidence of all artifacts' folders that the database lacks; returns how much that was."""
    known = {_measurement(item) for one in store.artifacts() for item in store.evidence(one.id)}
    missing: list[Evidence] = []
    for item in (item for one in store.artifacts() for item in _evidence_in(one)):
        if _measurement(item) not in known:
            known.add(_measurement(item))
            missing.append(replace(item, detail={**item.detail, **ELSEWHERE}))
    store.record(missing)
    return len(missing)


def _measurement(item: Evidence) -> tuple[Any, ...]:
    """What makes two pieces of evidence one measurement; machine and command are filled in when it is recorded."""
    numbers = tuple(map(repr, (item.value, item.low, item.high)))
    return item.artifact_id, item.metric, *numbers, item.n, item.seed, item.data_hash, item.parent_id


def _evidence_in(artifact: Artifact) -> list[Evidence]:
    """The evidence that an artifact's folder holds: about a model beside it, in a report as its content."""
    found: list[Evidence] = []
    with contextlib.suppress(ArtifactError, ConfigError, ValueError, TypeError, LookupError, OSError):
        beside = artifact.path / EVIDENCE
        if artifact.kind == "model" and beside.is_file() and beside.stat().st_size <= MAX_EVIDENCE_BYTES:
            body = read_json(beside.read_bytes(), str(beside))
            items = TypeAdapter(list[Evidence]).validate_json(canonical_json(body["evidence"]))
            found += [item for item in items if item.artifact_id == artifact.id]
    for record in (QualityReport, SpeedReport, HarnessReport):
        with contextlib.suppress(ArtifactError, OSError):
            name = record.name_in(artifact.files)
            if name is not None and hash_file(artifact.file(name)) == artifact.files[name].sha256:
                report = record.of(artifact)
                found += [item for item in report.evidence if item.artifact_id == report.model]
    return found
