"""API keys: a JSON file that holds a name, limits and the SHA-256 of each key, never a key.

A key is 256 random bits, so one round of SHA-256 is as good as a slow hash: there is nothing to guess. A presented key
is hashed and compared with every stored hash in constant time, so neither the response time nor the place in the file
leaks anything. The file is read again when it changes: a key that is taken out stops working within a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.record import Row
from gulliver.core.store.files import file_lock, write_atomic
from gulliver.core.store.manifest import read_json

PREFIX = "gk-"
MAX_FILE_BYTES = 8 * 2**20
MAX_KEY_CHARACTERS = 256
REREAD_SECONDS = 1.0
LOCK_SECONDS = 20.0  # to wait for another process that changes the file
MINUTE = 60.0
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
Limit = Annotated[int, Field(ge=1)] | None


class Key(Row):
    """One line of the file. Limits are per minute; None is unlimited."""

    name: Annotated[str, Field(pattern=_NAME)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None


class KeyFile(Row):
    """The file."""

    format: Literal[1]
    keys: list[Key]


class Bucket:
    """A bucket of `per_minute` units. `clock` gives seconds and never goes back."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._then = clock()

    def level(self) -> float:
        """What is in it now; negative is a debt."""
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._then) * self.per_minute / MINUTE)
        self._then = now
        return self._level

    def take(self, amount: float) -> None:
        """Take out, whatever the level is."""
        self._level = self.level() - amount

    def seconds_until(self, amount: float) -> float:
        """Seconds until it holds `amount`; 0 if it does."""
        return max(0.0, (amount - self.level()) * MINUTE / self.per_minute)


class Caller:
    """A key in use, with a bucket for each of its limits: full at first, filled again at the stated rate.

    A request takes one from the bucket of requests before it is read. What its tokens will be is not known then, so it
    is let in while the bucket of tokens is above zero and charged afterwards, prompt and completion; the bucket may
    fall below zero, and nothing more is let in until the debt is paid by time. Over a long time the rate holds exactly.
    """

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        self._buckets = {name: Bucket(limit, clock) for name, limit in limits.items() if limit}

    def admit(self) -> tuple[str, float] | None:
        """None, and the request is counted; or the limit reached ("requests", "tokens") and seconds until a retry."""
        for name, bucket in self._buckets.items():
            if (wait := bucket.seconds_until(1.0)) > 0:
                return name, wait
        self._take("requests", 1)
        return None

    def charge(self, tokens: int) -> None:
        """Count the tokens of a request that was let in."""
        self._take("tokens", tokens)

    def _take(self, name: str, count: int) -> None:
        if name in self._buckets:
            self._buckets[name].take(count)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's x-ratelimit-* headers for what is limited."""
        found = []
        for name, bucket in self._buckets.items():
            left = max(0, int(bucket.level()))
            found.append((f"x-ratelimit-limit-{name}".encode(), str(bucket.per_minute).encode()))
            found.append((f"x-ratelimit-remaining-{name}".encode(), str(left).encode()))
        return found


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
        self._read()

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
            self._read()
        except ConfigError as error:
            self.on_error(str(error))

    def _read(self) -> None:
        known = {caller.key: caller for caller in self._callers}
        self._callers = [known.get(key) or Caller(key) for key in read_keys(self.path)]


def hash_key(key: str) -> str:
    """SHA-256 of a key, 64 hex digits."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """All keys of a file. ConfigError for a file that is missing, malformed, or holds a name twice."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ConfigError(f"the key file {path} is not a file; give the name of one, new or made by `gulliver keys`")
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        remedy = f"make one with: gulliver keys {path} --add NAME"
        raise ConfigError(f"the key file {path} cannot be read ({error.strerror}); {remedy}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the key file {path} is over {MAX_FILE_BYTES} bytes; it is not a file of `gulliver keys`")
    return _parsed(data, path)


def _parsed(data: bytes, path: Path) -> list[Key]:
    """ConfigError says what is wrong, and where, without the value: it may be a key, written there by mistake."""
    try:
        read_json(data, str(path))  # duplicate fields and nesting without end, which pydantic would take
        keys = KeyFile.model_validate_json(data).keys
    except ArtifactError as error:
        raise ConfigError(str(error)) from None
    except ValidationError as error:
        problem = error.errors()[0]
        known = problem["loc"][:-1] if problem["type"] == "extra_forbidden" else problem["loc"]
        place = ".".join(map(str, known)) or "the file"
        raise ConfigError(f"{path}: {place}: {problem['msg']}; `gulliver keys` writes such files") from None
    for name, times in Counter(key.name for key in keys).items():
        if times > 1:
            raise ConfigError(f"{path}: duplicate key name {name!r}; remove one of them")
    return keys


def add_key(
    path: Path, name: str, *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
) -> str:
    """A new key, returned and nowhere kept; the file, which is made when missing, gets its hash."""
    if not re.fullmatch(_NAME, name):
        raise ConfigError(f"{name!r} is not a valid key name; use at most 64 letters, digits and . _ @ -")
    secret = PREFIX + secrets.token_urlsafe(32)
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    with _changing(path) as real:
        keys = read_keys(real) if real.exists() else []
        if any(key.name == name for key in keys):
            raise ConfigError(f"{path} already has a key named {name!r}; remove it first, or choose another name")
        _write(real, [*map(Key.model_dump, keys), {"name": name, "sha256": hash_key(secret), **limits}])
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file; a server that reads it refuses the key from then on."""
    read_keys(path)  # before a lock is made beside a file that does not exist
    with _changing(path) as real:
        keys = read_keys(real)
        kept = [key for key in keys if key.name != name]
        if len(kept) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise ConfigError(f"{path} has no key named {name!r}; it has: {known}")
        _write(real, list(map(Key.model_dump, kept)))


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Path]:
    """The file behind `path`, links followed, for one process at a time: two that read it at once would lose a key.

    ConfigError when it cannot be written, or another process holds it for too long.
    """
    try:
        real = path.resolve()
        with file_lock(real.with_name(f"{real.name}.lock"), LOCK_SECONDS):
            yield real
    except OSError as error:
        told = f"{error.strerror or error}); choose a folder that may be written into"
        raise ConfigError(f"the key file {path} cannot be written ({told}") from None


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps({"format": 1, "keys": rows}, indent=1) + "\n"
    _parsed(text.encode(), path)
    write_atomic(path, text, 0o600)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_size, status.st_ino)
