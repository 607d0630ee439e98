"""A private PostgreSQL server for the tests: Debian's own binaries, a temporary cluster, a Unix socket, no port.

`postgres_server` starts it once per test process and stops it at the end; `postgres_url` is a new, empty database. Both
skip, saying why, where no server is installed, and fail where CI=true.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from needed import missing

USER = "gulliver"


class PostgresServer:
    """One running cluster; `folder` holds its data, its socket and its log."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self.folder = folder

    def start(self) -> None:
        """Make the cluster and wait until it answers. RuntimeError with the server's log when it does not start."""
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        data = str(self.folder / "data")
        self._run("initdb", "--pgdata", data, "--username", USER, "--auth=trust", "--no-sync", "--encoding=UTF8")
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off -c max_connections=60"
        log = str(self.folder / "server.log")
        self._run("pg_ctl", "start", "--wait", "--silent", "--pgdata", data, "--log", log, "--options", options)

    def stop(self) -> None:
        """Stop the server and delete the cluster."""
        self._run("pg_ctl", "stop", "--wait", "--silent", "--mode=immediate", "--pgdata", str(self.folder / "data"))
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database of this server."""
        return f"postgresql://{USER}@/{database}?host={self.folder}"

    def create_database(self) -> str:
        """A new, empty database; returns its URL."""
        name = f"test_{secrets.token_hex(6)}"
        self._run("createdb", "--host", str(self.folder), "--username", USER, name)
        return self.url(name)

    def _run(self, program: str, *words: str) -> None:
        command = [str(self._binaries / program), *words]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        done = subprocess.run(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=120, check=False,
        ) if program != "pg_ctl" else _run_detached(command, self.folder)  # fmt: skip
        if done.returncode != 0:
            log = self.folder / "server.log"
            raise RuntimeError(f"{program} failed: {done.stdout}\n{log.read_text() if log.is_file() else ''}")


def _run_detached(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The server inherits pg_ctl's output, so a pipe would stay open for as long as it runs; a file does not matter."""
    out = folder / f"command-{secrets.token_hex(4)}.log"
    with open(out, "w") as stream:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=120, check=False
        )
    return subprocess.CompletedProcess(command, done.returncode, out.read_text())


def find_binaries() -> Path:
    """The folder of the newest server's programs. `missing` where there is none, or no user to run it as."""
    found = sorted(
        (folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if (folder / "initdb").is_file()),
        key=lambda folder: int(folder.parent.name),
    )
    if not found:
        missing("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            missing("root may not run PostgreSQL, and there is no user postgres to run it as")
    return found[-1]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running server of this test process alone."""
    server = PostgresServer(find_binaries(), Path(tempfile.mkdtemp(prefix="gulliver-pg-", dir="/tmp")))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of a new, empty database."""
    return postgres_server.create_database()
