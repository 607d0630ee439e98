"""The store: artifacts as folders named by their content id, and a database of evidence and runs beside them.

    home/artifacts/<id>/   the artifacts           home/gulliver.db   evidence and runs (or PostgreSQL by URL)
    home/work/<key>/       scratch of a step       home/cache/        downloads
    home/locks/            locks between processes

Any number of processes may use one home at once.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text

from gulliver.core.errors import ArtifactError, ConfigError, StorageError
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.store import chain
from gulliver.core.store.artifact import HOME_FOLDERS, Artifact, open_artifact
from gulliver.core.store.database import open_database, read, write
from gulliver.core.store.files import file_lock, named_path, sweep
from gulliver.core.store.manifest import MANIFEST, MAX_INTEGER, canonical_json, check_id

MIN_PREFIX = 6
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


@dataclass(frozen=True)
class RunRecord:
    """One finished step call: what was asked, the ids of its inputs by role, and what this call, which need not be

    the first that made the artifact, took. `finished_at` is UTC in ISO 8601.
    """

    key: str
    step: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Sequence[str]]
    artifact_id: str
    seconds: float
    peak_rss_bytes: int
    finished_at: str


_EVIDENCE_FIELDS = tuple(item.name for item in fields(Evidence))
_RUN_FIELDS = tuple(item.name for item in fields(RunRecord))


def home_folder(home: Path | str | None) -> Path:
    """Where the store of a home lies: ~/.gulliver when none is given. It need not exist."""
    return named_path("~/.gulliver" if home is None else home).absolute()


class Store:
    """Artifacts on disk and a database of evidence and runs. ConfigError when either cannot be used.

    `artifacts_folder` is home/artifacts; `cache` is home/cache, for downloads: all in it can be fetched again.
    """

    def __init__(self, home: Path | str | None = None, database_url: str | None = None) -> None:
        self.home = home_folder(home)
        self.artifacts_folder, self.cache = self.home / "artifacts", self.home / "cache"
        self.database_url = database_url
        self.copies: dict[str, Path] = {}  # content id -> the folder outside that the user named; its card keeps up
        try:
            for name in HOME_FOLDERS:
                (self.home / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the home {self.home} cannot be used: {error.strerror}; give another with --home"
            ) from None
        self._engine = open_database(self.home, database_url)
        sweep(self.home)
        sweep(self.artifacts_folder)

    # ---- artifacts --------------------------------------------------------------------------------------------
    def resolve(self, id_or_prefix: str) -> str:
        """The full id of the one artifact here whose id begins so. ArtifactError if none or several do."""
        if not re.fullmatch(r"[0-9a-f]{6,64}", id_or_prefix):
            raise ArtifactError(f"{id_or_prefix!r} is not an artifact id; give at least {MIN_PREFIX} of its hex digits")
        if len(id_or_prefix) == 64 and (self.artifacts_folder / id_or_prefix).is_dir():
            return id_or_prefix
        found = sorted(folder.name for folder in self._folders() if folder.name.startswith(id_or_prefix))
        if not found:
            raise ArtifactError(f"no artifact {id_or_prefix} in {self.home}; `gulliver list` shows what is there")
        if len(found) > 1:
            shown = ", ".join(name[:16] for name in found)
            raise ArtifactError(f"{id_or_prefix} fits {len(found)} artifacts: {shown}; give more digits")
        return found[0]

    def get(self, id_or_prefix: str) -> Artifact:
        """The artifact with this id, or the one whose id begins so. ArtifactError if none, or damaged."""
        full = self.resolve(id_or_prefix)
        artifact = open_artifact(self.artifacts_folder / full)
        if artifact.id != full:
            raise ArtifactError(f"the folder {full[:12]}… holds artifact {artifact.id[:12]}…; it was moved or changed")
        return artifact

    def has(self, artifact_id: str) -> bool:
        """True if this artifact is here and every listed file is present with its listed length."""
        try:
            artifact = self.get(artifact_id)
            artifact.paths()
        except ArtifactError:
            return False
        return True

    def artifacts(self) -> list[Artifact]:
        """All readable artifacts, oldest first. Those that cannot be read are in `damaged()`."""
        return self._scan()[0]

    def damaged(self) -> list[ArtifactError]:
        """Why each folder here that is not a readable artifact cannot be read."""
        return self._scan()[1]

    def lineage(self, artifact_id: str) -> list[dict[str, Any]]:
        """Manifests of the artifact and all it was made from, nearest first, each once, "inputs" and "parents" in each.

        An ancestor that is not in this store is {"id": …, "missing": True}.
        """
        first = self.resolve(artifact_id)
        order, seen = [first], {first}
        manifests: list[dict[str, Any]] = []
        for current in order:
            if not (self.artifacts_folder / current).is_dir():
                manifests.append({"id": current, "missing": True})
                continue
            artifact = self.get(current)
            inputs = {role: list(ids) for role, ids in artifact.inputs.items()}
            manifests.append({**artifact.manifest, "inputs": inputs, "parents": list(artifact.parents)})
            for parent in artifact.parents:
                if parent not in seen:
                    seen.add(parent)
                    order.append(parent)
        return manifests

    # ---- evidence ---------------------------------------------------------------------------------------------
    def record(self, evidence: Sequence[Evidence]) -> None:
        """Write evidence down, all of it or nothing. It can never be changed. ArtifactError if it names no artifact."""
        rows = []
        for item in evidence:
            check_id(item.artifact_id, f"the artifact of the evidence for {item.metric}")
            numbers = {"value": item.value, "low": item.low, "high": item.high}
            known = {name: None if math.isnan(number) else float(number) for name, number in numbers.items()}
            rows.append({**vars(item), **known, "detail": canonical_json(item.detail).decode(), "recorded_at": _now()})
        if rows:
            with write(self._engine) as connection:
                chain.append(connection, "evidence", rows)

    def evidence(self, artifact_id: str) -> list[Evidence]:
        """All evidence about this exact artifact (full id), in the order in which it was recorded."""
        query = text(f"SELECT {', '.join(_EVIDENCE_FIELDS)} FROM evidence WHERE artifact_id = :artifact ORDER BY id")
        with read(self._engine) as connection:
            rows = connection.execute(query, {"artifact": artifact_id}).mappings().all()
        return [_evidence(row) for row in rows]

    # ---- runs -------------------------------------------------------------------------------------------------
    def find_run(self, key: str, max_rss_bytes: int | None = None) -> RunRecord | None:
        """The newest finished run with this reuse key that held at most `max_rss_bytes`, or None (see `has`)."""
        most = MAX_INTEGER if max_rss_bytes is None else max_rss_bytes
        which = "WHERE key = :key AND peak_rss_bytes <= :most ORDER BY id DESC LIMIT 1"
        return next(iter(self._runs(which, key=key, most=most)), None)

    def finish_run(
        self,
        key: str,
        step: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Sequence[str]],
        artifact_id: str,
        seconds: float,
        peak_rss_bytes: int,
    ) -> RunRecord:
        """Write down that a step call finished and what it made; returns what was written."""
        check_id(artifact_id, f"the artifact that {step} made")
        run = RunRecord(key, step, config, inputs, artifact_id, seconds, peak_rss_bytes, _now())
        row = {**vars(run), "config": canonical_json(config).decode(), "inputs": canonical_json(inputs).decode()}
        with write(self._engine) as connection:
            chain.append(connection, "runs", [row])
        return run

    def runs(self) -> list[RunRecord]:
        """All finished runs, oldest first."""
        return self._runs("ORDER BY id")

    def _runs(self, which: str, **values: Any) -> list[RunRecord]:
        query = text(f"SELECT {', '.join(_RUN_FIELDS)} FROM runs {which}")
        with read(self._engine) as connection:
            return [_run(row) for row in connection.execute(query, values).mappings().all()]

    def verify(self) -> dict[str, int]:
        """The number of rows by table, every one as it was written. StorageError names the first that is not."""
        with read(self._engine) as connection:
            misfit = chain.first_misfit(connection)
            counts = {table: chain.count(connection, table) for table in chain.TABLES}
        if misfit is not None:
            raise StorageError(f"the database {self._engine.url.render_as_string()} was changed: {misfit}")
        return counts

    # ---- work -------------------------------------------------------------------------------------------------
    def lock(self, key: str, timeout_s: float | None = None) -> AbstractContextManager[None]:
        """Hold `key` against all other processes and threads; freed when the process dies."""
        return file_lock(self.home / "locks" / f"{_check_key(key)}.lock", timeout_s)

    def work(self, key: str) -> Path:
        """The scratch folder of a reuse key; it outlives a kill. Hold `lock(key)` while using it."""
        folder = self.home / "work" / _check_key(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear_work(self, key: str) -> None:
        """Delete the scratch folder of a reuse key."""
        shutil.rmtree(self.home / "work" / _check_key(key), ignore_errors=True)

    def _folders(self) -> list[Path]:
        return [path for path in self.artifacts_folder.iterdir() if re.fullmatch(r"[0-9a-f]{64}", path.name)]

    def _scan(self) -> tuple[list[Artifact], list[ArtifactError]]:
        found: list[Artifact] = []
        damaged: list[ArtifactError] = []
        for folder in sorted(self._folders()):
            try:
                found.append(self.get(folder.name))
            except ArtifactError as error:
                damaged.append(error)
        return sorted(found, key=lambda one: ((one.path / MANIFEST).stat().st_mtime_ns, one.id)), damaged


def _check_key(key: str) -> str:
    assert _KEY.fullmatch(key), f"{key!r} cannot name a lock or a work folder"
    return key


def _run(row: Any) -> RunRecord:
    inputs = json.loads(row["inputs"])  # older versions wrote one id for each role
    listed = {role: [ids] if isinstance(ids, str) else ids for role, ids in inputs.items()}
    return RunRecord(**{**row, "config": json.loads(row["config"]), "inputs": listed})


def _evidence(row: Any) -> Evidence:
    numbers = {name: math.nan if row[name] is None else row[name] for name in ("value", "low", "high")}
    return Evidence(**{**row, **numbers, "detail": json.loads(row["detail"])})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
