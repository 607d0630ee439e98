"""Disks that are full or refuse, limits of the system, and standard streams that are closed: one line, exit code 2."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from artifact_samples import make

from gulliver.core.errors import ArtifactError, StorageError
from gulliver.core.store import disk
from gulliver.core.store.artifact import check_target, copy_artifact
from gulliver.core.store.disk import storage_error, storage_errors
from gulliver.core.store.files import sweep, unfinished, write_atomic
from gulliver.core.store.store import Store

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[None]:
    """A soft limit of this process, taken off again: (the limit, its value)."""
    which, value = request.param
    before = resource.getrlimit(which)
    resource.setrlimit(which, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@pytest.mark.usefixtures("toy_table", "limited")
@pytest.mark.parametrize("limited", [(resource.RLIMIT_FSIZE, 6000)], indirect=True)
def test_a_limit_on_the_size_of_files_is_one_line(command: Run) -> None:
    for words in (("list",), ("make", "--weights", "4096")):
        code, out, err = command(*words)
        assert (code, out) == (2, "") and err.count("error: ") == 1 and "Traceback" not in err
        assert "may not grow beyond" in err and "(6,000 bytes)" in err and "ulimit -f" in err


@pytest.mark.usefixtures("toy_table")
def test_the_same_command_ends_well_when_there_is_room_again(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert command("list")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, out, err = command("make", "--weights", "8")
    assert (code, out) == (2, "") and "no space is left on this disk" in err and "Traceback" not in err
    assert command("make", "--weights", "8")[0] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.usefixtures("toy_table")
@pytest.mark.parametrize("size", ["4k", "60k", "160k"])
def test_a_full_disk_is_one_line(command: Run, tmp_path: Path, size: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk could be mounted: {mounted.stderr.decode()}")
    try:
        code, out, err = command("make", "--weights", "100000", "--home", small / "home")
        assert (code, out) == (2, "") and "Traceback" not in err
        assert str(small) in err and "no space is left on this disk" in err and "bytes are free" in err
        code, out, err = command("make", "--weights", "100000", "--out", small / "out")
        assert code == 2 and str(small / "out") in err and "needs" in err and list(small.glob("out*")) == []
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        code, out, err = command("list", "--home", small / "home")
        assert (code, out) == (2, "") and "ead-only file system" in err
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(errno.ENOSPC, "x", "/nowhere/file"), "/nowhere/file: no space is left"),
        (OSError(errno.EDQUOT, "x", "/f"), "/f: disk quota exceeded"),
        (OSError(errno.EROFS, "x", "/a", None, "/b"), "/b: read-only file system; make it writable"),
        (OSError(errno.EMFILE, "x", "/f"), r"too many files are open; this process may open \d+; raise the limit"),
        (PermissionError(errno.EACCES, "x", "/f"), "/f: permission denied; change its permissions"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "/home/here: no space is left"),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), "too many files are open"),
        (OSError("4096 requested and 0 written"), "/home/here: no space is left"),
    ],
)
def test_each_way_in_which_a_disk_refuses_is_understood(
    failure: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 0 if "here" in str(path) else 10**9)
    with pytest.raises(StorageError, match=told) as found, storage_errors("/home/here", None):
        raise failure
    assert found.value.exit_code == 2 and "\n" not in str(found.value)


@pytest.mark.parametrize("failure", [FileNotFoundError(errno.ENOENT, "x"), ValueError("no space"), BrokenPipeError()])
def test_what_is_no_fault_of_a_disk_stays_what_it_is(failure: Exception) -> None:
    assert storage_error(failure, "/home/here") is None
    with pytest.raises(type(failure)), storage_errors("/home/here"):
        raise failure


# ---- --out is looked at first ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("toy_table")
@pytest.mark.parametrize(
    "out", ["dangling", "loop/x", "file", "file/x", "full", "x" * 240, "other", "home/artifacts/x", "."]
)
def test_an_out_that_cannot_be_used_is_told_before_the_work(command: Run, tmp_path: Path, out: str) -> None:
    import toys.make

    base = tmp_path / "base"
    (base / "full").mkdir(parents=True)
    (base / "full" / "thesis.tex").write_text("x")
    (base / "file").write_text("x")
    (base / "dangling").symlink_to(base / "nowhere")
    (base / "loop").symlink_to(base / "loop")
    make(base, {"a": b"b"}).path.rename(base / "other")
    code, printed, err = command("make", "--weights", "8", "--out", base / out, "--home", base / "home")
    assert (code, printed) == (2, "") and err.startswith("error: ") and "Traceback" not in err
    assert toys.make.calls == []


@pytest.mark.usefixtures("toy_table")
def test_an_out_that_holds_what_will_be_made_is_kept_and_another_is_refused_first(command: Run, tmp_path: Path) -> None:
    import toys.make

    made = ("make", "--weights", "8", "--out", tmp_path / "out")
    assert command(*made)[0] == command(*made)[0] == 0
    assert command(*made, "--home", tmp_path / "new")[0] == 0  # a home that has not made it yet
    done = len(toys.make.calls)
    code, _, err = command("make", "--weights", "9", "--out", tmp_path / "out")
    assert code == 2 and "holds another artifact (make, " in err and len(toys.make.calls) == done
    link = tmp_path / "link"
    (tmp_path / "there").mkdir()
    link.symlink_to(tmp_path / "there")
    assert command("make", "--weights", "8", "--out", link)[0] == 0 and (tmp_path / "there" / "gulliver.json").is_file()


def test_a_copy_that_does_not_fit_says_how_much_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make(tmp_path / "store")
    monkeypatch.setattr(disk, "free_bytes", lambda path: 100)
    with pytest.raises(StorageError, match=r"the copy needs \d+ bytes and 100 are free"):
        copy_artifact(artifact, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


# ---- what killed processes left -------------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
from pathlib import Path
from gulliver.core.store import files
folder = Path(sys.argv[1])
whole = files.whole_folder(folder / "out")
(whole.__enter__() / "half").write_text("x")
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomic(folder / "card.md", "half")
"""


def test_half_copies_of_a_killed_process_are_cleaned_by_the_next(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.glob("*.tmp-*"))) == 2
    path, descriptor = unfinished(lambda: tmp_path / "out.tmp-0123456789ab")
    assert check_target(tmp_path / "out") == tmp_path / "out"
    write_atomic(tmp_path / "card.md", "whole")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["card.md", "out.tmp-0123456789ab"]
    assert sweep(tmp_path) == []
    os.close(descriptor)
    assert sweep(tmp_path) == [path]


def test_a_file_in_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "gone" / "file", "x")


def test_a_new_store_sweeps_its_own_folder_and_follows_no_link(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (store.home / "machine.json.tmp-0123456789ab").write_text("{")
    (store.artifacts_folder / f"{'a' * 64}.tmp-0123456789ab").mkdir()
    (store.home / "link.tmp-ba9876543210").symlink_to(tmp_path / "mine")
    Store(store.home)
    assert (tmp_path / "mine").is_dir() and list(store.home.glob("*.tmp-*")) == [store.home / "link.tmp-ba9876543210"]
    assert list(store.artifacts_folder.iterdir()) == []


# ---- standard streams -----------------------------------------------------------------------------------------------
TOYS = """
import sys
import toys
from gulliver.cli.main import main
from gulliver.pipeline import steps
steps.STEPS = toys.TABLE
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ('"$@" <&- >&- 2>&-', 0),
        ('"$@" >/dev/full', 2),
        ('"$@" 2>/dev/full', 0),
        ('"$@" | true', 0),
        ('"$@" 2> >(true)', 0),
    ],
)
def test_streams_that_are_closed_or_full_lose_no_work(shell: str, code: int, tmp_path: Path) -> None:
    home, log = tmp_path / "home", tmp_path / "log"
    words = [sys.executable, "-c", TOYS, "make", "--weights", "8", "--home", str(home), "--json"]
    with log.open("w") as stream:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", shell, "x", *words],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdout=subprocess.DEVNULL,
            stderr=stream,
            check=False,
        )
    assert done.returncode == code and "Traceback" not in log.read_text() and "Exception" not in log.read_text()
    assert [run.step for run in Store(home).runs()] == ["make"]
    if shell == '"$@" >/dev/full':
        assert "standard output cannot be written: No space left on device" in log.read_text()


def test_an_encoding_without_a_character_gets_an_escape(tmp_path: Path) -> None:
    for encoding in ("ascii", "latin-1"):
        done = subprocess.run(
            [sys.executable, "-m", "gulliver", "show", "héim-你", "--home", str(tmp_path), "--json"],
            env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and b"Traceback" not in done.stderr
        assert done.stdout.isascii() and b'"exit_code": 2' in done.stdout


def test_the_error_of_out_is_typed(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"lies in the home"):
        check_target(tmp_path / "home" / "artifacts" / "x", tmp_path / "home")
