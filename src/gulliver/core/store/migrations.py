"""The database schema as a history. Append-only: a migration that has been released is never edited; add another.

Each entry is one migration: its SQL, common or by dialect, or a function where rows must be computed. `migrate` applies
those that are missing, all in one transaction. Writers come one at a time (database.py), so processes that start at
once do it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import Connection, text

from gulliver.core.errors import ConfigError
from gulliver.core.store.chain import TABLES, chain_all

_ROW = {"sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT", "postgresql": "BIGSERIAL PRIMARY KEY"}
_REAL = "DOUBLE PRECISION"

Migration = Sequence[str] | Mapping[str, Sequence[str]] | Callable[[Connection], None]


def _chain(connection: Connection) -> None:
    """4: rows are chained by hash, and no statement changes the past: none that replaces, inserts before, or truncates.

    SQLite deletes a row that INSERT OR REPLACE replaces without asking the triggers on DELETE, so that is refused
    before it inserts. What an older Gulliver would write has no chain and is refused too.
    """
    sqlite = connection.dialect.name == "sqlite"
    for table in TABLES:
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN chain TEXT NOT NULL DEFAULT ''")
        off = f"DROP TRIGGER {table}_no_update" if sqlite else f"ALTER TABLE {table} DISABLE TRIGGER USER"
        connection.exec_driver_sql(off)
    chain_all(connection)
    for statement in _sqlite_guards() if sqlite else _postgresql_guards():
        connection.exec_driver_sql(statement)


def _sqlite_guards() -> list[str]:
    refuse = " BEGIN SELECT RAISE(ABORT, '{0} is append-only'); END"
    guards = [f"CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table}{refuse.format(table)}" for table in TABLES]
    for table in TABLES:
        there = f"EXISTS (SELECT 1 FROM {table} WHERE id = NEW.id)"
        past = f"NEW.id < (SELECT MAX(id) FROM {table}) OR length(NEW.chain) <> 64"
        for name, when in (("no_replace BEFORE", there), ("no_past AFTER", past)):
            guards.append(f"CREATE TRIGGER {table}_{name} INSERT ON {table} WHEN {when}{refuse.format(table)}")
    table = "schema_history"
    for verb in ("UPDATE", "DELETE"):
        guards.append(f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table}{refuse.format(table)}")
    there = f"EXISTS (SELECT 1 FROM {table} WHERE number = NEW.number)"
    guards.append(f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {there}{refuse.format(table)}")
    return guards


def _postgresql_guards() -> list[str]:
    history, guards = "schema_history", []
    for table in TABLES:
        guards.append(
            f"CREATE FUNCTION gulliver_{table}_appends() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF NEW.id <= (SELECT MAX(id) FROM {table}) OR length(NEW.chain) <> 64 THEN"
            f" RAISE EXCEPTION '{table} is append-only'; END IF; RETURN NEW; END $$"
        )
        guards.append(
            f"CREATE TRIGGER {table}_appends BEFORE INSERT ON {table}"
            f" FOR EACH ROW EXECUTE FUNCTION gulliver_{table}_appends()"
        )
    refuse = "EXECUTE FUNCTION gulliver_append_only()"
    guards.append(f"CREATE TRIGGER {history}_append_only BEFORE UPDATE OR DELETE ON {history} FOR EACH ROW {refuse}")
    for table in (*TABLES, history):
        guards.append(f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} FOR EACH STATEMENT {refuse}")
        names = [f"{table}_append_only", f"{table}_no_truncate", *([f"{table}_appends"] if table in TABLES else [])]
        guards += [f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}" for name in names]
    return guards


MIGRATIONS: Sequence[Migration] = (
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
    _chain,
)


def applied(connection: Connection) -> int | None:
    """How many migrations this database has had; None for one that is new, or holds only what is not ours."""
    if "schema_history" not in tables(connection):
        return None
    return connection.execute(text("SELECT COALESCE(MAX(number), 0) FROM schema_history")).scalar_one()


def tables(connection: Connection) -> set[str]:
    """The names of the tables in the database, or in its schema that is used."""
    query = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
        "postgresql": "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()",
    }[connection.dialect.name]
    return set(connection.execute(text(query)).scalars())


def check_known(done: int | None) -> bool:
    """True when nothing is missing. ConfigError when a newer Gulliver made the database."""
    if done is not None and done > len(MIGRATIONS):
        raise ConfigError(
            f"the database has schema {done}, this Gulliver knows up to {len(MIGRATIONS)}: upgrade Gulliver"
        )
    return done == len(MIGRATIONS)


def migrate(connection: Connection) -> int:
    """Bring the database up to date inside the caller's write transaction; returns how many migrations were applied.

    ConfigError if the database was made by a newer Gulliver.
    """
    dialect = connection.dialect.name
    connection.execute(text("CREATE TABLE IF NOT EXISTS schema_history (number BIGINT PRIMARY KEY)"))
    done = applied(connection) or 0
    check_known(done)
    for number, migration in enumerate(MIGRATIONS[done:], start=done + 1):
        if callable(migration):
            migration(connection)
        else:
            for statement in migration[dialect] if isinstance(migration, Mapping) else migration:
                connection.exec_driver_sql(statement.replace("{row}", _ROW[dialect]).replace("{real}", _REAL))
        connection.execute(text("INSERT INTO schema_history (number) VALUES (:number)"), {"number": number})
    return len(MIGRATIONS) - done
