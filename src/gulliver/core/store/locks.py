"""Waiting for what another process holds, never without an end: a holder that does nothing is named, and given up on.

Who holds a lock is told by /proc/locks, or else by the process id in the lock's file.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gulliver.core.errors import ConfigError, StorageError

IDLE_S = 60.0
"""How long a lock is waited for whose holder uses no processor time: it hangs, or is out of sight."""
STOPPED_S = 20.0
"""How long when the holder is stopped (Ctrl-Z, SIGSTOP)."""
SAY_AFTER_S = 2.0
"""After how long it is said on stderr what is waited for."""
_LOOK_EVERY_S = 0.05


class Wait:
    """One wait for `what` others hold. Call `still` after each look: it says for whom it waits, and ends it.

    It ends when the holders did nothing for `idle_s`, or have been stopped for STOPPED_S; after `most_s` in any case.
    """

    def __init__(self, what: str, idle_s: float = IDLE_S, most_s: float = math.inf) -> None:
        self.what, self.idle_s, self.most_s = what, idle_s, most_s
        self.began = self.busy = time.monotonic()
        self.said = False
        self._worked: dict[int, int] = {}

    def still(self, pids: Sequence[int], who: Callable[[], str] | None = None) -> None:
        """StorageError at the end of the wait. `who` names holders that are not processes of this machine."""
        now = time.monotonic()
        worked = {pid: ticks for pid in pids if (ticks := _processor_ticks(pid)) is not None}
        if worked != self._worked or os.getpid() in pids:  # another thread of ours is at work
            self._worked, self.busy = worked, now
        idle_s = min(self.idle_s, STOPPED_S) if pids and all(map(_stopped, pids)) else self.idle_s
        over = now - self.began >= self.most_s or now - self.busy >= idle_s
        if not over and (self.said or now - self.began < SAY_AFTER_S):
            return
        held_by = (who() if who else "") or named(pids)
        if over:
            told = f"another process holds {self.what}: {held_by} did not give it up in {now - self.began:.0f} s"
            raise StorageError(f"{told}; {_remedy(pids)}, then repeat the command")
        self.said = True
        bound = f"at most {min(idle_s, self.most_s):g} s" + (" if it does nothing" if self.most_s == math.inf else "")
        print(f"waiting for {held_by} that holds {self.what}; {bound}", file=sys.stderr, flush=True)


def lock_holders(path: Path) -> list[int]:
    """Ids of the other processes that hold a lock on a file, as the kernel tells; none where it does not."""
    try:
        state, rows = path.stat(), Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    device = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
    held = [row.split() for row in rows if "->" not in row]  # an arrow marks those that wait
    here = [words for words in held if len(words) > 5 and words[5].rpartition(":")[2] == str(state.st_ino)]
    exact = [words for words in here if words[5] == device]  # some file systems show the lock under another device
    return sorted({int(words[4]) for words in exact or here if words[4].isdigit()} - {0, os.getpid()})


def acquire(descriptor: int, path: Path, timeout_s: float | None, idle_s: float) -> None:
    """Lock an open file; waits and errors are those of `files.file_lock`."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    wait, look = Wait(str(path), idle_s), 0.0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if deadline is not None and time.monotonic() >= deadline:
                told = f"another process holds {path}: {named(_holders(path))}"
                raise ConfigError(f"{told}; wait for it to finish, or stop it") from None
        if deadline is None and time.monotonic() >= look:
            wait.still(_holders(path))
            look = time.monotonic() + 0.5
        time.sleep(_LOOK_EVERY_S)


def _holders(path: Path) -> list[int]:
    """Who holds the lock: as the kernel tells, or as is written in it."""
    found = lock_holders(path)
    with contextlib.suppress(OSError, ValueError):
        written = int(path.read_bytes()[:20])
        if not found and Path(f"/proc/{written}").exists():
            found = [written]
    return found


def _processor_ticks(pid: int) -> int | None:
    """The processor time that a process and those that it started have used, in the kernel's ticks.

    None where it cannot be seen.
    """
    if _stat(pid) is None:
        return None
    known = {int(one.name): _stat(int(one.name)) for one in Path("/proc").iterdir() if one.name.isdigit()}
    found, family = 0, [pid]
    while family:
        one = family.pop()
        family += [child for child, words in known.items() if words is not None and int(words[1]) == one]
        words = known.get(one)
        found += 0 if words is None else int(words[11]) + int(words[12])
    return found


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat that follow the program's name: the state first."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def named(pids: Sequence[int]) -> str:
    """The holders for people: "process 12 (stopped)"."""
    names = []
    for pid in pids:
        names.append(f"process {pid}{' (stopped)' if _stopped(pid) else ''}")
    return " and ".join(names) or "a process that cannot be seen from here"


def _stopped(pid: int) -> bool:
    words = _stat(pid)
    return words is not None and words[0] in "Tt"


def _remedy(pids: Sequence[int]) -> str:
    which = " ".join(map(str, pids))
    if pids and all(map(_stopped, pids)):
        return f"let it go on (`kill -CONT {which}`) or end it (`kill -KILL {which}`)"
    return f"let it end, or end it{f' (`kill {which}`)' if pids else ''}"
