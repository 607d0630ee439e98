"""A run that was killed goes on where it stopped and makes the same artifact; two runs may share one home."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gulliver.core.progress import Progress
from gulliver.core.store.artifact import verify
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call

pytestmark = pytest.mark.usefixtures("toy_table")
BLOCKS = 20


def _start(home: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "toys", *words, "--home", str(home), "--json", "--quiet"]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def _wait_until_working(process: subprocess.Popen[str], home: Path) -> None:
    """Return when the step has begun, however long the interpreter took to start."""
    while process.poll() is None and not list((home / "work").glob("*/*")):
        time.sleep(0.01)


def test_a_killed_run_goes_on_and_makes_the_same_artifact(
    store: Store, quiet: Progress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"blocks": BLOCKS, "block_seconds": 0.02}
    model = call("make", {"weights": 4000}, {}, store=store, progress=quiet)
    whole = Store(tmp_path / "uninterrupted")
    call("make", {"weights": 4000}, {}, store=whole, progress=quiet)
    expected = call("shrink", config, {"model": model}, store=whole, progress=quiet)
    moments = random.Random(7)
    for _ in range(4):
        words = ["--blocks", str(BLOCKS), "--block-seconds", "0.02"]
        process = _start(store.home, "shrink", model.id, *words)
        _wait_until_working(process, store.home)
        time.sleep(moments.uniform(0.0, 0.12))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished = list((store.home / "work").glob("*/block-*.npy"))
    assert 0 < len(finished) < BLOCKS or store.has(expected.id)
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    resumed = call("shrink", config, {"model": model}, store=store, progress=quiet)
    assert resumed.id == expected.id
    assert len(slept) == (BLOCKS - len(finished) if finished else 0)  # finished blocks were not done again
    verify(resumed)


def test_a_kill_between_the_artifact_and_its_record_loses_nothing(
    store: Store, quiet: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "finish_run", killed)
        with pytest.raises(KeyboardInterrupt):
            call("make", {}, {}, store=store, progress=quiet)
    made = call("make", {}, {}, store=store, progress=quiet)
    assert [artifact.id for artifact in store.artifacts()] == [made.id]


RECIPE = """
[[step]]
id = "parent"
use = "make"
[[step]]
id = "small"
use = "shrink"
inputs = { model = "parent" }
block_seconds = 0.05
[[step]]
id = "report"
use = "measure"
inputs = { model = "small" }
"""


def test_concurrent_runs_share_a_home_and_do_the_work_once(tmp_path: Path) -> None:
    home, recipe = tmp_path / "home", tmp_path / "life.toml"
    recipe.write_text(RECIPE)
    report = str(tmp_path / "report.html")
    processes = [_start(home, "run", str(recipe), "--report", report) for _ in range(3)]
    processes += [_start(home, "make", "--weights", str(weights)) for weights in (16, 17)]
    results = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for _, code in results] == [0] * 5, [err for (_, err), _ in results]
    documents = [json.loads(out) for (out, _), _ in results[:3]]
    made = [[entry["artifact"] for entry in document["calls"]] for document in documents]
    assert made[0] == made[1] == made[2]
    for place in range(3):
        assert sum(not document["calls"][place]["reused"] for document in documents) == 1
    store = Store(home)
    assert len(store.runs()) == 5
    assert len(store.evidence(made[0][1])) == 2
    for artifact in store.artifacts():
        verify(artifact)
    assert store.damaged() == []
    with sqlite3.connect(home / "gulliver.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
