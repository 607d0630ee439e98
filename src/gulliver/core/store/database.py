"""Opening the database of a store: SQLite in the home folder, or PostgreSQL by URL, with the schema up to date."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy
from sqlalchemy import Engine, NullPool, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from gulliver.core.errors import ConfigError, MissingExtra
from gulliver.core.store.files import file_lock
from gulliver.core.store.migrations import migrate

BUSY_TIMEOUT_S = 60
_LOCK = 7_350_613  # the advisory lock that all Gulliver processes agree on


def open_database(home: Path, database_url: str | None) -> Engine:
    """An engine whose schema is up to date. ConfigError for a URL that cannot be used; MissingExtra without psycopg.

    Safe when several processes open a new database at once.
    """
    url = f"sqlite:///{home / 'gulliver.db'}" if database_url is None else database_url
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"--database {url!r} is not a URL; write postgresql://user@host/name") from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    try:
        options = {"timeout": BUSY_TIMEOUT_S} if parsed.get_backend_name() == "sqlite" else {}
        engine = sqlalchemy.create_engine(parsed, poolclass=NullPool, connect_args=options)
    except ModuleNotFoundError:
        raise MissingExtra(f"the database {parsed.render_as_string()}", "postgres") from None
    except NoSuchModuleError:
        raise ConfigError(f"--database {url!r} is not supported; use sqlite:///FILE or postgresql://…") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    with _schema_lock(parsed):
        try:
            _reach(engine)
        except engine.dialect.loaded_dbapi.Error as error:
            shown = parsed.render_as_string()
            raise ConfigError(f"the database {shown} cannot be opened: {str(error).strip()}; check the URL") from None
        with write(engine) as connection:
            migrate(connection)
    return engine


@contextlib.contextmanager
def write(engine: Engine) -> Iterator[sqlalchemy.Connection]:
    """A transaction that writes: all of it or nothing, and one at a time, so that row numbers follow commit order.

    SQLite's write lock is taken at once; PostgreSQL, whose sequences are outside transactions, takes an advisory one.
    """
    with engine.connect().execution_options(gulliver_write=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK})
        yield connection


def _prepare_sqlite(connection, record) -> None:
    connection.isolation_level = None  # SQLAlchemy, not the driver, begins transactions
    connection.execute("PRAGMA synchronous=FULL")


def _begin_sqlite(connection: sqlalchemy.Connection) -> None:
    writes = connection.get_execution_options().get("gulliver_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _schema_lock(url: sqlalchemy.URL) -> contextlib.AbstractContextManager[None]:
    """Held while the schema is brought up to date: a file beside SQLite's; PostgreSQL is locked by `write`."""
    if url.get_backend_name() != "sqlite":
        return contextlib.nullcontext()
    path = Path(url.database or "")
    if url.database in (None, "", ":memory:") or not path.parent.is_dir():
        raise ConfigError(f"the database {url} cannot be opened: give a file in a folder that exists")
    return file_lock(path.with_name(f"{path.name}.lock"))


def _reach(engine: Engine) -> None:
    """Connect once. SQLite is put into WAL mode, kept in its file, in which readers never wait for a writer."""
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute("PRAGMA journal_mode=WAL" if engine.dialect.name == "sqlite" else "SELECT 1")
        cursor.close()
    finally:
        raw.close()
