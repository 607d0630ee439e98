"""Rows that stay: each holds a hash over what it says and over the hash of the row before, so a changed past shows.

    chain of row k = SHA-256 of the canonical JSON of [chain of row k - 1 ("" for the first), the row's columns]

Columns that are NULL are left out, real numbers are written as Python does, and the row's number is no part of it. The
hash has no key: it shows a change by one who does not rewrite all rows after it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, text

from gulliver.core.errors import ConfigError
from gulliver.core.store.manifest import canonical_json

TABLES: Mapping[str, tuple[str, ...]] = {
    "evidence": (
        "recorded_at", "metric", "value", "low", "high", "unit", "direction", "n", "seed", "data_hash", "artifact_id",
        "parent_id", "machine", "command", "detail",
    ),
    "runs": ("finished_at", "key", "step", "config", "inputs", "artifact_id", "seconds", "peak_rss_bytes"),
}  # fmt: skip
"""The tables that are chained, with the columns that the hash covers."""
_REAL = ("value", "low", "high", "seconds")


def link(previous: str, row: Mapping[str, Any]) -> str:
    """The chain of a row (its columns by name) that follows one whose chain is `previous`; 64 hex digits."""
    there = {name: value for name, value in row.items() if value is not None}
    said = {name: repr(float(value) + 0.0) if name in _REAL else value for name, value in there.items()}
    return hashlib.sha256(canonical_json([previous, said])).hexdigest()


def append(connection: Connection, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows at the end of a table, chained. The connection must be one of `database.write`: one at a time."""
    columns = TABLES[table]
    last = connection.execute(text(f"SELECT chain FROM {table} ORDER BY id DESC LIMIT 1")).scalar() or ""
    chained = []
    for row in rows:
        last = link(last, {name: row[name] for name in columns})
        chained.append({**{name: row[name] for name in columns}, "chain": last})
    names = (*columns, "chain")
    values = ", ".join(f":{name}" for name in names)
    connection.execute(text(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({values})"), chained)


def rows_in_order(connection: Connection, table: str) -> Generator[tuple[int, str, dict[str, Any], bool]]:
    """(number, chain, columns, whether it fits) of each row, oldest first; `fits` compares with the row before."""
    columns = TABLES[table]
    query = text(f"SELECT id, chain, {', '.join(columns)} FROM {table} ORDER BY id")
    last = ""
    with contextlib.closing(connection.execute(query, execution_options={"yield_per": 1000})) as found:
        for number, chain, *values in found:
            row = dict(zip(columns, values, strict=True))
            try:
                fits = chain == link(last, row)
            except (TypeError, ValueError, ConfigError):  # a value of another type than was ever written
                fits = False
            yield number, chain, row, fits
            last = chain


def first_misfit(connection: Connection) -> str | None:
    """What is wrong with the first row that is not what was written; None when every row of every table fits."""
    for table in TABLES:
        number = 0
        with contextlib.closing(rows_in_order(connection, table)) as rows:
            for number, _, row, fits in rows:
                if not fits:
                    what = f"{row['metric' if table == 'evidence' else 'step']} of {str(row['artifact_id'])[:12]}"
                    told = f"row {number} of {table} ({what}) does not fit the row before"
                    return f"{told}: one of the two was changed, or rows between them were removed or inserted"
        newest = _newest_number(connection, table)
        if newest is not None and newest > number:
            return f"{table} ends with row {number}, but row {newest} was written once: the last rows were removed"
    return None


def count(connection: Connection, table: str) -> int:
    """How many rows a table has."""
    return connection.execute(text(f"SELECT COUNT(*) FROM {table}")).scalar_one()


def chain_all(connection: Connection) -> None:
    """Chain the rows that are there already, in their order; for the migration that brings the column."""
    for table in TABLES:
        last, links = "", []
        for number, _, row, _ in rows_in_order(connection, table):
            last = link(last, row)
            links.append({"number": number, "chain": last})
        if links:
            connection.execute(text(f"UPDATE {table} SET chain = :chain WHERE id = :number"), links)


def _newest_number(connection: Connection, table: str) -> int | None:
    """The highest number that a row ever had; None on PostgreSQL, where a write that failed takes a number too."""
    if connection.dialect.name != "sqlite":
        return None
    return connection.execute(text("SELECT seq FROM sqlite_sequence WHERE name = :name"), {"name": table}).scalar()
