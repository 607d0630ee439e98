"""Fixtures for all tests: a home of its own, the toy table, no network, and one thread per worker."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from gulliver.cli import main as cli
from gulliver.core.progress import Progress
from gulliver.core.store.store import Store
from gulliver.pipeline import steps

hypothesis.settings.register_profile("gulliver", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gulliver")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that one worker has them, and the other runs the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in a home of this test alone."""
    return Store(tmp_path / "home")


@pytest.fixture
def quiet() -> Progress:
    """Progress that shows nothing."""
    return Progress(quiet=True)


@pytest.fixture
def toy_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of tests/toys in place of the real ones."""
    import toys

    monkeypatch.setattr(steps, "STEPS", toys.TABLE)
    import toys.make

    toys.make.calls.clear()


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run one command line in this process with this test's home; returns (exit code, stdout, stderr)."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        home = [] if "--home" in words else ["--home", str(tmp_path / "home")]
        capsys.readouterr()
        code = cli.main([*map(str, words), *home])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trained toy language model with its data, in a store that all tests of a session share."""
    from compress_samples import language_lab

    return language_lab(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trained digits classifier with its data, in a store that all tests of a session share."""
    from compress_samples import vision_lab

    return vision_lab(tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that opens a connection to another machine fails; local sockets (PostgreSQL) are allowed."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        local = self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise AssertionError(f"this test tried to reach {address}; tests use no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield
