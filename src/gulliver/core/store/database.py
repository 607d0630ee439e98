"""Opening the database of a store: SQLite in the home folder, or PostgreSQL by URL, with the schema up to date.

Whatever a database refuses is one StorageError that says what to do; a lock that others hold is waited for within a
stated time, and the holder is named (see locks.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy
from sqlalchemy import Connection, Engine, NullPool, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from gulliver.core.errors import ConfigError, MissingExtra, StorageError
from gulliver.core.store.chain import TABLES
from gulliver.core.store.disk import free_bytes, storage_error
from gulliver.core.store.files import file_lock
from gulliver.core.store.locks import Wait, lock_holders, named
from gulliver.core.store.migrations import applied, check_known, migrate, tables

DATABASE = "gulliver.db"
"""The SQLite database in a home."""
SUFFIXES = ("", "-wal", "-shm")
"""Of the names of its files: itself, its write-ahead log and the log's index."""
BUSY_S = 20.0
"""How long a database is waited for that another program locks."""
SCHEMA_IDLE_S = 10.0
"""How long the lock on the schema is waited for while its holder does nothing."""
CONNECT_S = 10
"""How long PostgreSQL may take to answer a connection."""
REPAIR = "`gulliver doctor --repair` with the same --home keeps it aside and restores what the artifacts hold"
_LOCK = 7_350_613  # the advisory lock that all Gulliver processes agree on
_LOOK_EVERY_S = 0.02


class DamagedDatabase(StorageError):
    """An SQLite file that is no database any more, or not a whole one."""


def open_database(home: Path, database_url: str | None) -> Engine:
    """An engine whose schema is up to date. ConfigError for a URL that cannot be used; MissingExtra without psycopg;

    StorageError for a database that is damaged, locked, out of reach, or another program's. Safe when several processes
    open a new database at once.
    """
    engine = _engine(f"sqlite:///{home / DATABASE}" if database_url is None else database_url)
    with database_errors(engine):
        if not _is_current(engine, home if database_url is None else None):
            with _schema_lock(engine.url):
                _reach(engine)
                with write(engine) as connection:
                    migrate(connection)
    return engine


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"--database {url!r} is not a URL; write postgresql://user@host/name") from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    options = {"timeout": 1.0}  # then _patiently looks for whom it waits
    if parsed.get_backend_name() == "postgresql":
        me = f"gulliver, process {os.getpid()} on {socket.gethostname()}"
        options = {"connect_timeout": CONNECT_S, "fallback_application_name": me[:63]}
        options = {name: value for name, value in options.items() if name not in parsed.query}
    try:
        engine = sqlalchemy.create_engine(parsed, poolclass=NullPool, connect_args=options)
    except ModuleNotFoundError:
        raise MissingExtra(f"the database {parsed.render_as_string()}", "postgres") from None
    except NoSuchModuleError:
        raise ConfigError(f"--database {url!r} is not supported; use sqlite:///FILE or postgresql://…") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    elif engine.dialect.name == "postgresql":
        event.listen(engine, "connect", _prepare_postgresql)
    else:
        told = f"the database is {engine.dialect.name}; give sqlite:///FILE or postgresql+psycopg://HOST/NAME"
        raise ConfigError(told)
    return engine


@contextlib.contextmanager
def write(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes: all of it or nothing, and one at a time, so that row numbers follow commit order.

    SQLite's write lock is taken at once; PostgreSQL, whose sequences are outside transactions, takes an advisory one.
    """
    with (
        database_errors(engine),
        engine.connect().execution_options(gulliver_write=True) as connection,
        connection.begin(),
    ):
        if engine.dialect.name == "postgresql":
            _advisory_lock(connection)
        yield connection


@contextlib.contextmanager
def read(engine: Engine) -> Iterator[Connection]:
    """A transaction that reads: one state of the database throughout."""
    with database_errors(engine), engine.connect() as connection, connection.begin():
        yield connection


# ---- errors ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def database_errors(engine: Engine) -> Iterator[None]:
    """Within the block, what the database refuses is a StorageError; a statement that is wrong stays what it is."""
    try:
        yield
    except DBAPIError as failure:
        told = _told(engine, failure.orig)
        if told is None:
            raise
        raise told from failure
    except engine.dialect.loaded_dbapi.Error as failure:  # what the driver raises before SQLAlchemy hears of it
        told = _told(engine, failure)
        if told is None:
            raise
        raise told from failure


def _told(engine: Engine, failure: BaseException | None) -> StorageError | None:
    if isinstance(failure, sqlite3.Error):
        return _sqlite_told(Path(engine.url.database or ""), failure)
    if failure is None:
        return None
    said, state = " ".join(str(failure).split()), getattr(failure, "sqlstate", None) or ""
    shown = engine.url.render_as_string()
    if state in ("42501", "25006"):  # insufficient privilege, read-only transaction
        return StorageError(f"the database {shown} may not be written: {said}; give this user the rights, or another")
    if state == "55P03":  # lock not available
        return StorageError(f"the database {shown} is locked by another program: {said}; end it, then try again")
    if state.startswith(("53", "54", "58", "XX")):  # no disk, memory or connections left; its files are damaged
        return StorageError(f"the database {shown} cannot go on: {said}; mend it, then repeat the command")
    if state.startswith(("08", "57P", "28", "3D")) or (type(failure).__name__ == "OperationalError" and not state):
        remedy = "check that it runs, and the user, password and name in the URL"
        return StorageError(f"the database {shown} cannot be opened: {said}; {remedy}")
    return None


def _sqlite_told(path: Path, failure: sqlite3.Error) -> StorageError | None:
    said, name = str(failure), getattr(failure, "sqlite_errorname", "") or ""
    kind = "_".join(name.split("_")[:2])
    if kind in ("SQLITE_CORRUPT", "SQLITE_NOTADB") or said.startswith(("no such table", "no such column")):
        return DamagedDatabase(f"the database {path} is damaged ({said}); {REPAIR}")
    if kind in ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL"):
        told = f"the database {path} is locked by {named([pid for file in _files(path) for pid in lock_holders(file)])}"
        return StorageError(f"{told}; end it, then repeat the command")
    if kind in ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH"):
        system = _system_error(path, kind)
        cannot = StorageError(f"the database {path} cannot be used: {said}; check the disk and the file's permissions")
        return cannot if system is None else storage_error(system) or cannot
    return None


def _system_error(path: Path, kind: str) -> OSError | None:
    """Why SQLite could not write or open its file, which it does not say; None when that cannot be told.

    The file itself is not opened: closing it would free the locks that other threads hold on it.
    """
    try:
        os.close(os.open(path.parent, os.O_RDONLY))
        if os.statvfs(path.parent).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, "", str(path))
        if kind == "SQLITE_FULL" or (kind == "SQLITE_IOERR" and (free_bytes(path) or 0) < 2**20):
            raise OSError(errno.ENOSPC, "", str(path))
        if kind == "SQLITE_IOERR":
            if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
                raise OSError(errno.EFBIG, "", str(path))
            raise OSError(errno.EIO, "", str(path))
        for one in (path.parent, *(beside for beside in _files(path) if beside.exists())):
            if not os.access(one, os.R_OK | os.W_OK):
                raise OSError(errno.EACCES, "", str(one))
    except OSError as system:
        system.filename = system.filename or str(path)
        return system
    return None


def _files(path: Path) -> list[Path]:
    """The files of an SQLite database: itself, its write-ahead log and the log's index."""
    return [path.with_name(f"{path.name}{suffix}") for suffix in SUFFIXES]


# ---- connections and locks -------------------------------------------------------------------------------------------
def _prepare_sqlite(connection, record) -> None:
    connection.isolation_level = None  # SQLAlchemy, not the driver, begins transactions
    connection.execute("PRAGMA synchronous=FULL")


def _prepare_postgresql(connection, record) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = {round(1000 * BUSY_S)}")
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    """Begin, and take the lock at once: to write where the transaction will, else to read."""
    if connection.get_execution_options().get("gulliver_write", False):
        _patiently(connection.engine, lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    else:
        connection.exec_driver_sql("BEGIN")
        _patiently(connection.engine, lambda: connection.exec_driver_sql("PRAGMA schema_version").close())


def _patiently(engine: Engine, run: Callable[[], object]) -> None:
    """Do what needs SQLite's lock. StorageError, naming the holder, when it is not free within BUSY_S."""
    path = Path(engine.url.database or "")
    wait = Wait(f"the database {path}", BUSY_S, BUSY_S)
    while True:
        try:
            run()
            return
        except (DBAPIError, sqlite3.Error) as failure:
            said = getattr(failure, "orig", failure)
            if not str(getattr(said, "sqlite_errorname", "")).startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise
        wait.still([pid for file in _files(path) for pid in lock_holders(file)])


def _advisory_lock(connection: Connection) -> None:
    """PostgreSQL's lock of all Gulliver processes until the end of the transaction, waited for as SQLite's."""
    number = {"number": _LOCK}
    who = text(
        "SELECT COALESCE(NULLIF(application_name, ''), 'a client') || ' (backend ' || pid || ')' FROM pg_locks"
        " JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted AND objid = :number"
    )
    wait = Wait(f"the database {connection.engine.url.render_as_string()}", BUSY_S, BUSY_S)
    while not connection.execute(text("SELECT pg_try_advisory_xact_lock(:number)"), number).scalar_one():
        wait.still([], lambda: ", ".join(connection.execute(who, number).scalars()))
        time.sleep(_LOOK_EVERY_S)


def _is_current(engine: Engine, home: Path | None) -> bool:
    """True for a database that needs no migration. ConfigError for one of a newer Gulliver.

    StorageError for one that holds something else, and for an empty file in a home whose artifacts had evidence.
    """
    path = Path(engine.url.database or "")
    if engine.dialect.name == "sqlite" and not path.is_file():
        if engine.url.database and (path.is_dir() or path.is_symlink()):
            raise StorageError(f"the database {path} is not a file; move it away, or give another with --database")
        return False
    empty = engine.dialect.name == "sqlite" and path.stat().st_size == 0
    if empty and home is not None and any((home / "artifacts").glob("[0-9a-f]*")):
        raise DamagedDatabase(f"the database {path} is damaged (it is empty, but there are artifacts); {REPAIR}")
    if empty:
        return False
    with read(engine) as connection:
        found = tables(connection)
        done = applied(connection) if "schema_history" in found else None
        if done is None and (found & set(TABLES) or (found and engine.dialect.name == "sqlite")):
            told = f"holds the tables of another program ({', '.join(sorted(found)[:3])})"
            raise StorageError(f"the database {engine.url.render_as_string()} {told}; give another with --database")
        return check_known(done)


def _schema_lock(url: sqlalchemy.URL) -> contextlib.AbstractContextManager[None]:
    """Held while the schema is brought up to date: a file beside SQLite's; PostgreSQL is locked by `write`."""
    if url.get_backend_name() != "sqlite":
        return contextlib.nullcontext()
    path = Path(url.database or "")
    if url.database in (None, "", ":memory:") or not path.parent.is_dir():
        raise ConfigError(f"the database {url} cannot be opened: give a file in a folder that exists")
    return file_lock(path.with_name(f"{path.name}.lock"), idle_s=SCHEMA_IDLE_S)


def _reach(engine: Engine) -> None:
    """Put SQLite into WAL mode, kept in its file, in which readers never wait for a writer."""
    if engine.dialect.name == "sqlite":
        with contextlib.closing(engine.raw_connection()) as raw:
            _patiently(engine, lambda: raw.cursor().execute("PRAGMA journal_mode=WAL").close())
