"""API keys: a JSON file that holds a name, limits and the SHA-256 of each key, never a key.

A key is 256 random bits, so one round of SHA-256 is as good as a slow hash: there is nothing to guess. A presented key
is hashed and compared with every stored hash in constant time, so neither the response time nor the place in the file
leaks anything. The file is read again when it changes: a key that is taken out stops working within a second.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.store.files import write_atomic
from gulliver.core.store.manifest import read_json
from gulliver.serve.limits import Limiter

FORMAT = 1
PREFIX = "gk-"
MAX_FILE_BYTES = 8 * 2**20
MAX_KEY_CHARACTERS = 256
REREAD_SECONDS = 1.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """One line of the file. Limits are per minute; None is unlimited."""

    name: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass
class Caller:
    """A key in use: what it may still ask for."""

    key: Key
    limiter: Limiter


@dataclass
class KeyRing:
    """The keys of a file, read again when it changes. `find` gives the caller that a presented key belongs to."""

    path: Path
    on_error: Callable[[str], None]
    _callers: list[Caller] = field(default_factory=list)
    _seen: tuple[int, int, int] = (0, 0, 0)
    _looked: float = 0.0

    def __post_init__(self) -> None:
        self._seen = _stamp(self.path)
        self._callers = [_caller(key) for key in read_keys(self.path)]
        self._looked = time.monotonic()

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, presented: str) -> Caller | None:
        """The caller, or None. Every stored hash is compared, whichever matches."""
        self._refresh()
        if len(presented) > MAX_KEY_CHARACTERS:
            return None
        digest = hash_key(presented)
        found = None
        for caller in self._callers:
            if hmac.compare_digest(digest, caller.key.sha256):
                found = caller
        return found

    def _refresh(self) -> None:
        """Read the file again if it changed. A file that cannot be read leaves the keys as they were, and says so."""
        now = time.monotonic()
        if now - self._looked < REREAD_SECONDS:
            return
        self._looked = now
        try:
            stamp = _stamp(self.path)
            if stamp == self._seen:
                return
            self._seen = stamp
            known = {caller.key: caller for caller in self._callers}
            self._callers = [known.get(key) or _caller(key) for key in read_keys(self.path)]
        except ConfigError as error:
            self.on_error(str(error))


def hash_key(key: str) -> str:
    """SHA-256 of a key, 64 hex digits."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """All keys of a file. ConfigError for a file that is missing, malformed, or holds a name twice."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        remedy = f"make one with: gulliver keys {path} --add NAME"
        raise ConfigError(f"the key file {path} cannot be read ({error.strerror}); {remedy}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the key file {path} is over {MAX_FILE_BYTES} bytes; it is not a file of `gulliver keys`")
    try:
        body = read_json(data, str(path))
    except ArtifactError as error:
        raise ConfigError(str(error)) from None
    rows = body.get("keys") if isinstance(body, dict) else None
    if not isinstance(rows, list) or body.get("format") != FORMAT:
        raise ConfigError(f'{path} is not a key file; it must hold {{"format": {FORMAT}, "keys": [...]}}')
    keys = [_key(row, path) for row in rows]
    for name, times in Counter(key.name for key in keys).items():
        if times > 1:
            raise ConfigError(f"{path}: duplicate key name {name!r}; remove one of them")
    return keys


def add_key(
    path: Path, name: str, *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
) -> str:
    """A new key, returned and nowhere kept; the file, which is made when missing, gets its hash."""
    keys = read_keys(path) if path.exists() else []
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a valid key name; use at most 64 letters, digits and . _ @ -")
    if any(key.name == name for key in keys):
        raise ConfigError(f"{path} already has a key named {name!r}; remove it first, or choose another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    added = Key(name, hash_key(secret), requests_per_minute, tokens_per_minute)
    _write(path, [*keys, _key(asdict(added), path)])
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file; a server that reads it refuses the key from then on."""
    keys = read_keys(path)
    kept = [key for key in keys if key.name != name]
    if len(kept) == len(keys):
        raise ConfigError(f"{path} has no key named {name!r}; it has: {', '.join(key.name for key in keys) or 'none'}")
    _write(path, kept)


def _write(path: Path, keys: Sequence[Key]) -> None:
    body = {"format": FORMAT, "keys": [asdict(key) for key in keys]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(body, indent=1) + "\n")
    os.chmod(path, 0o600)


def _key(row: Any, path: Path) -> Key:
    needed, limits = {"name", "sha256"}, {"requests_per_minute", "tokens_per_minute"}
    if not isinstance(row, dict) or not needed <= set(row) <= needed | limits:
        raise ConfigError(f"{path}: a key has {', '.join(sorted(needed))} and optionally {', '.join(sorted(limits))}")
    if not (isinstance(row["name"], str) and _NAME.fullmatch(row["name"])):
        raise ConfigError(f"{path}: {str(row['name'])[:64]!r} is not a valid key name")
    if not (isinstance(row["sha256"], str) and _HASH.fullmatch(row["sha256"])):
        raise ConfigError(f"{path}: the key {row['name']!r} needs a SHA-256 of 64 lower-case hex digits")
    for limit in sorted(limits):
        value = row.get(limit)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(
                f"{path}: {limit} of the key {row['name']!r} is {value!r}; it must be an integer of at least 1"
            )
    return Key(**row)


def _caller(key: Key) -> Caller:
    return Caller(key, Limiter(key.requests_per_minute, key.tokens_per_minute))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_size, status.st_ino)
