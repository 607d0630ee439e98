"""The database schema as a history. Append-only: a migration that has been released is never edited; add another.

Each entry is the SQL of one migration, common or by dialect; `migrate` applies those that are missing, all in one
transaction. Writers come one at a time (database.py), so processes that start at once do it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, text

from gulliver.core.errors import ConfigError

_ROW = {"sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT", "postgresql": "BIGSERIAL PRIMARY KEY"}
_REAL = "DOUBLE PRECISION"

MIGRATIONS: Sequence[Sequence[str] | Mapping[str, Sequence[str]]] = (
    (  # 1: evidence
        "CREATE TABLE evidence (id {row}, recorded_at TEXT NOT NULL, metric TEXT NOT NULL, value {real}, low {real},"
        " high {real}, unit TEXT NOT NULL, direction TEXT NOT NULL, n BIGINT NOT NULL, seed BIGINT NOT NULL,"
        " data_hash TEXT NOT NULL, artifact_id TEXT NOT NULL, parent_id TEXT, machine TEXT NOT NULL,"
        " command TEXT NOT NULL, detail TEXT NOT NULL)",
        "CREATE INDEX evidence_by_artifact ON evidence (artifact_id, id)",
    ),
    (  # 2: runs
        "CREATE TABLE runs (id {row}, finished_at TEXT NOT NULL, key TEXT NOT NULL, step TEXT NOT NULL,"
        " config TEXT NOT NULL, inputs TEXT NOT NULL, artifact_id TEXT NOT NULL, seconds {real} NOT NULL,"
        " peak_rss_bytes BIGINT NOT NULL)",
        "CREATE INDEX runs_by_key ON runs (key, id)",
    ),
    {  # 3: what was recorded stays recorded
        "sqlite": [
            f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table} BEGIN"
            f" SELECT RAISE(ABORT, '{table} is append-only'); END"
            for table in ("evidence", "runs")
            for verb in ("update", "delete")
        ],
        "postgresql": [
            "CREATE FUNCTION gulliver_append_only() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION USING MESSAGE = TG_TABLE_NAME || ' is append-only'; END $$",
            *(
                f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table}"
                " FOR EACH ROW EXECUTE FUNCTION gulliver_append_only()"
                for table in ("evidence", "runs")
            ),
        ],
    },
)


def migrate(connection: Connection) -> int:
    """Bring the database up to date inside the caller's write transaction; returns how many migrations were applied.

    ConfigError if the database was made by a newer Gulliver, or its dialect is neither SQLite nor PostgreSQL.
    """
    dialect = connection.dialect.name
    if dialect not in _ROW:
        raise ConfigError(f"the database is {dialect}; give sqlite:///FILE or postgresql+psycopg://HOST/NAME")
    connection.execute(text("CREATE TABLE IF NOT EXISTS schema_history (number BIGINT PRIMARY KEY)"))
    done = connection.execute(text("SELECT COALESCE(MAX(number), 0) FROM schema_history")).scalar_one()
    if done > len(MIGRATIONS):
        raise ConfigError(
            f"the database has schema {done}, this Gulliver knows up to {len(MIGRATIONS)}: upgrade Gulliver"
        )
    for number, migration in enumerate(MIGRATIONS[done:], start=done + 1):
        statements = migration[dialect] if isinstance(migration, Mapping) else migration
        for statement in statements:
            connection.exec_driver_sql(statement.replace("{row}", _ROW[dialect]).replace("{real}", _REAL))
        connection.execute(text("INSERT INTO schema_history (number) VALUES (:number)"), {"number": number})
    return len(MIGRATIONS) - done
