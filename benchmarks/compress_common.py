"""What the parts of compress.py share: a command in a process of its own, measured from outside; stages; the results.

This process must stay small and never import torch: Linux counts the memory that a process held before `exec` as part
of the peak of what it became, so a large measuring process would be reported as the peak of every command.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from peers_common import circumstances

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Done:
    """A finished command. `peak_rss_bytes` is the most resident memory it held, seen from outside."""

    code: int
    output: str
    seconds: float
    peak_rss_bytes: int

    @property
    def document(self) -> dict:
        """What `gulliver … --json` printed."""
        return json.loads(self.output)

    @property
    def cost(self) -> dict:
        return {"seconds": round(self.seconds, 1), "peak_rss_bytes": self.peak_rss_bytes}


def measured(command: Sequence[object], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Run a command; its progress goes to this process's stderr.

    The peak is the highest of what `wait4` says and what /proc says every 20 ms: gulliver starts its own peak again
    before each step, and `wait4` alone would then know the last step only.
    """
    with tempfile.TemporaryFile("w+") as output:
        began, peak = time.monotonic(), 0
        process = subprocess.Popen([str(word) for word in command], stdout=output, env=env, cwd=cwd)
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                peak = max(peak, _resident(process.pid))
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.kill()
            raise
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
        peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        output.seek(0)
        return Done(process.returncode, output.read(), seconds, peak)


def _resident(pid: int) -> int:
    """VmHWM of a process in bytes; 0 when it is gone or the system has no /proc."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def command_line(*words: object, home: Path) -> list[str]:
    """The command line of `gulliver WORDS` as a user would type it."""
    return [sys.executable, "-m", "gulliver", *map(str, words), "--json", "--home", str(home)]


def gulliver(*words: object, home: Path, may_refuse: bool = False) -> Done:
    """One gulliver command, measured. Ends the program when it fails, unless it refuses (3, 4) and that may be."""
    done = measured(command_line(*words, home=home))
    if done.code and not (may_refuse and done.code in (3, 4)):
        raise SystemExit(f"gulliver {' '.join(map(str, words))}: exit {done.code}\n{done.output[-2000:]}")
    return done


class Stages:
    """What one row needs, stage by stage in a folder: a run that was broken off goes on after the last whole stage.

    A folder whose row is finished, or any with `fresh`, is emptied first, so that measuring again measures again.
    """

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self.folder = folder
        if fresh or (folder / "finished").exists():
            shutil.rmtree(folder, ignore_errors=True)
        self.home = folder / "home"
        self.whole = not self.home.exists()
        """False when some of the work was done before, so that times of this run say too little."""
        folder.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, produce: Callable[[], dict]) -> dict:
        """The result of a stage, JSON: kept from an earlier run, or made now."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_atomic(path, json.dumps(produce()))
        return json.loads(path.read_text(encoding="utf-8"))

    def finish(self, *, keep: bool) -> None:
        """The row is written: remove the folder, or keep it to look at."""
        if keep:
            (self.folder / "finished").touch()
        else:
            shutil.rmtree(self.folder)


class Results:
    """The result file, {"parents": {id: quality}, "rows": [...]}; read again before each change, so other rows stay."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict:
        if self.path.exists():
            return json.loads(self.path.read_text(encoding="utf-8"))
        return {"parents": {}, "rows": []}

    def has(self, part: str, key: str) -> bool:
        return any((row["part"], row["key"]) == (part, key) for row in self.read()["rows"])

    def put(self, part: str, key: str, row: Mapping[str, object]) -> None:
        """Add the row of (part, key) with machine, date and versions, or replace it."""
        data = self.read()
        rows = [one for one in data["rows"] if (one["part"], one["key"]) != (part, key)]
        rows.append({"part": part, "key": key, **row, **here()})
        data["rows"] = sorted(rows, key=lambda one: (one["part"], one["key"]))
        self._write(data)
        print(json.dumps({"part": part, "key": key, **row}), flush=True)

    def parent(self, parent_id: str, measure: Callable[[], dict]) -> dict:
        """What the parent reaches, measured once for each parent."""
        data = self.read()
        if parent_id not in data["parents"]:
            quality = {**measure(), **here()}
            data = self.read()
            data["parents"][parent_id] = quality
            self._write(data)
        return data["parents"][parent_id]

    def _write(self, data: dict) -> None:
        write_atomic(self.path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def here() -> dict:
    """Date, machine and versions, for every row."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    known = circumstances(threads)
    return {**known, "versions": {**known["versions"], "gulliver": version("gulliver")}}


def write_atomic(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
