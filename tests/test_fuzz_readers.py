"""The readers of strangers' files under a short run of their structured fuzz: read, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COUNTS = {"model": 60, "tokenizer": 100, "gguf": 100, "template": 100, "recipe": 200, "data": 200}


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz_readers  # pyright: ignore[reportMissingImports]

    return fuzz_readers


@pytest.mark.parametrize("reader", COUNTS)
def test_a_changed_file_is_read_or_refused(reader: str, fuzz: Any, tmp_path: Path) -> None:
    row = fuzz.fuzz(reader, COUNTS[reader], 7, tmp_path)
    assert row["read"] + row["refused"] == COUNTS[reader], sorted(path.name for path in tmp_path.iterdir())
    assert row["refused"] > COUNTS[reader] // 10


def test_every_fault_is_counted(fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that fails in each way that is looked for."""
    import os

    held: list[bytes] = []
    ways = (
        lambda: 1 // 0,
        lambda: os.kill(os.getpid(), 9),
        lambda: held.append(b"x" * 600_000_000),
        lambda: [None for _ in iter(int, 1)],
    )

    def read(folder: Path) -> None:
        number = int(folder.name.rpartition("-")[2]) if folder.name.startswith("recipe-") else -1
        if 0 <= number < len(ways):
            ways[number]()

    monkeypatch.setitem(
        fuzz.READERS, "recipe", fuzz.Reader(fuzz.READERS["recipe"].seeds, read, {".toml": fuzz.mutations.BYTES})
    )
    row = fuzz.fuzz("recipe", 6, 1, tmp_path)
    assert {kind: row[kind] for kind in ("read", "traceback", "died", "memory", "time")} == {
        "read": 2, "traceback": 1, "died": 1, "memory": 1, "time": 1,
    }  # fmt: skip
    assert fuzz.faults(row) == 4 and len(list(tmp_path.iterdir())) == 4
