"""`gulliver.json`: what it may hold, and one strict reader. See docs/artifact.md; the rules there are enforced here.

Everything read is hostile until it has passed `parse`: the bytes may be truncated, the names may leave the folder, the
numbers may be huge. Each fault is an ArtifactError of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.names import unknown

FORMAT = 2
UNNAMED = ""
"""The role of all inputs of an artifact of format 1, which did not record roles."""
MANIFEST = "gulliver.json"
KINDS = ("model", "dataset", "report")
EVIDENCE, REPORT = "evidence.json", "report.html"
ANNOTATIONS = ("README.md", EVIDENCE, REPORT)
ORIGIN = "origin.json"
PACKING = "packing.json"
"""Named here and not in core/records.py, because a packed model opens without pydantic."""
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_INTEGER = 2**63 - 1

_KEYS = ("format", "id", "kind", "task", "inputs", "step", "config", "seed", "files")
_ID = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


def rows_of(shape: Sequence[int], inputs: int | None) -> int:
    """Rows of the matrix that a packed weight of `shape` is; `inputs` as in core/records.py's PackedWeight."""
    return shape[0] if inputs is None else math.prod(size for dim, size in enumerate(shape) if dim != inputs)


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: SHA-256 (64 hex digits) and length in bytes."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of `gulliver.json`. `id` is the SHA-256 of the canonical JSON of all the rest, 64 hex digits.

    `inputs` maps the role that each input had in the step ("model", "dataset") to its ids, in the step's order; `step`
    holds the name and version of what made it; `config` the full resolved options; `files` all content files by
    relative POSIX name.
    """

    id: str
    kind: str
    task: str
    inputs: Mapping[str, tuple[str, ...]] = field(compare=False)
    step: Mapping[str, Any] = field(compare=False)
    config: Mapping[str, Any] = field(compare=False)
    seed: int = field(compare=False)
    files: Mapping[str, FileEntry] = field(compare=False, repr=False)

    @property
    def parents(self) -> tuple[str, ...]:
        """The ids of all inputs, each once."""
        return tuple(dict.fromkeys(one for role in sorted(self.inputs) for one in self.inputs[role]))

    @property
    def manifest(self) -> dict[str, Any]:
        """The JSON object in `gulliver.json`."""
        inputs = {role: list(ids) for role, ids in self.inputs.items()}
        first = UNNAMED in inputs
        return {
            "format": 1 if first else FORMAT,
            "id": self.id,
            "kind": self.kind,
            "task": self.task,
            **({"parents": inputs[UNNAMED]} if first else {"inputs": inputs}),
            "step": dict(self.step),
            "config": dict(self.config),
            "seed": self.seed,
            "files": {name: dict(vars(entry)) for name, entry in self.files.items()},
        }


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes. ConfigError for NaN or infinity."""
    try:
        form = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
        return json.dumps(value, default=_plain, **form).encode("utf-8")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"a value cannot be written as JSON ({error}); use finite numbers and text") from None


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def read_json(data: bytes, what: str) -> Any:
    """Parse JSON from an untrusted source. ArtifactError for bad UTF-8, truncation, duplicate keys, huge or non-finite

    numbers, and nesting too deep to read. `what` names the source in the message.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(items)
        if len(seen) != len(items):
            twice = next(key for key, count in Counter(key for key, _ in items).items() if count > 1)
            raise ArtifactError(f"{what}: duplicate key {twice!r}")
        return seen

    def integer(text: str) -> int:
        if len(text) > 20 or abs(int(text)) > MAX_INTEGER:
            raise ArtifactError(f"{what}: the number {text[:24]}… does not fit in 64 bits")
        return int(text)

    def real(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ArtifactError(f"{what}: the number {text[:24]!r} is not finite")
        return number

    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=real
        )
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{what} is not UTF-8 text (byte {error.start}); the file is damaged") from None
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{what} is not valid JSON (line {error.lineno}: {error.msg}); it is damaged") from None
    except RecursionError:
        raise ArtifactError(f"{what} is nested too deep to read") from None


def manifest_id(body: Mapping[str, Any]) -> str:
    """The content id of a manifest without its `id` key."""
    return hashlib.sha256(canonical_json({key: value for key, value in body.items() if key != "id"})).hexdigest()


def check_file_name(name: object, what: str = MANIFEST) -> str:
    """`name` if it is a safe relative POSIX path inside a folder, else ArtifactError."""
    if not isinstance(name, str) or not name:
        raise ArtifactError(f"{what}: a file name is empty or not text: {name!r}")
    _require(len(name.encode("utf-8", "replace")) <= 1024, f"{what}: the name {name[:40]!r}… is over 1024 bytes")
    _require(not name.startswith("/"), f"{what}: the file name {name!r} is absolute; names are relative to the folder")
    printable = name.isprintable() and "\\" not in name and ":" not in name
    _require(printable, f"{what}: the file name {name!r} holds a backslash, a colon or a control character")
    parts = name.split("/")
    _require(".." not in parts, f"{what}: the file name {name!r} leaves the folder ('..')")
    _require("" not in parts and "." not in parts, f"{what}: the file name {name!r} is not in plain form")
    return name


def parse(data: bytes, what: str = MANIFEST) -> Manifest:
    """The manifest in `data`, fully checked. ArtifactError names the first thing that is wrong."""
    _require(len(data) <= MAX_MANIFEST_BYTES, f"{what} has {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    body = read_json(data, what)
    _require(isinstance(body, dict), f"{what} must be a JSON object, not {type(body).__name__}")
    version = body.get("format")
    if type(version) is int and version > FORMAT:
        raise ArtifactError(f"{what} has format {version}; this Gulliver reads up to {FORMAT}: upgrade it")
    first = type(version) is int and version == 1
    keys = tuple("parents" if first and key == "inputs" else key for key in _KEYS)
    for key in body:
        if key not in keys:
            raise ArtifactError(f"{what}: {unknown('key', key, keys)}")
    for key in keys:
        _require(key in body, f"{what}: the key {key!r} is missing")
    _require(first or (type(version) is int and version == FORMAT), f"{what}: format is {version!r}, not 1 or {FORMAT}")
    _require(body["kind"] in KINDS, f"{what}: {unknown('kind', body['kind'], KINDS)}")
    manifest = Manifest(
        id=check_id(body["id"], f"{what}: id"),
        kind=body["kind"],
        task=_name(body["task"], f"{what}: task"),
        inputs={UNNAMED: _ids(body["parents"], f"{what}: parents")} if first else _inputs(body["inputs"], what),
        step=_step(body["step"], what),
        config=_object(body["config"], f"{what}: config"),
        seed=_integer(body["seed"], f"{what}: seed"),
        files=_files(body["files"], what),
    )
    try:
        derived = manifest_id(body)
    except (ConfigError, RecursionError) as error:  # half a character, or 990 lists in each other
        raise ArtifactError(f"{what}: {error}; it is damaged") from None
    if derived != manifest.id:
        raise ArtifactError(f"{what}: id is {manifest.id[:12]}… but its content gives {derived[:12]}…; it was changed")
    return manifest


def check_id(value: object, what: str) -> str:
    """`value` if it is a full content id (64 lower-case hex digits), else ArtifactError."""
    return _text(value, _ID, f"{what} is {value!r}, not 64 hex digits")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ArtifactError(message)


def _text(value: object, pattern: re.Pattern[str], message: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ArtifactError(message)
    return value


def _name(value: object, what: str) -> str:
    return _text(value, _NAME, f"{what} is {value!r}, not a plain lower-case name")


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{what} must be a JSON object, not {type(value).__name__}")
    return value


def _integer(value: object, what: str, low: int = 0, high: int = MAX_INTEGER) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArtifactError(f"{what} must be a whole number, not {value!r}")
    _require(low <= value <= high, f"{what} is {value}; it must lie between {low} and {high}")
    return value


def _inputs(value: object, what: str) -> dict[str, tuple[str, ...]]:
    inputs: dict[str, tuple[str, ...]] = {}
    for role, listed in _object(value, f"{what}: inputs").items():
        _name(role, f"{what}: the role of an input")
        inputs[role] = _ids(listed, f"{what}: input {role}")
        _require(inputs[role] != (), f"{what}: input {role} is an empty list")
    return inputs


def _ids(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ArtifactError(f"{what} must be a list, not {type(value).__name__}")
    ids = tuple(check_id(one, f"{what}: an id") for one in value)
    _require(len(set(ids)) == len(ids), f"{what}: duplicate id")
    return ids


def _step(value: object, what: str) -> dict[str, Any]:
    step = _object(value, f"{what}: step")
    _require(set(step) == {"name", "version"}, f"{what}: step must hold name and version, not {sorted(step)}")
    _name(step["name"], f"{what}: step name")
    _integer(step["version"], f"{what}: step version", 1)
    return step


def _files(value: object, what: str) -> dict[str, FileEntry]:
    files: dict[str, FileEntry] = {}
    folded: dict[str, str] = {}
    for name, entry in _object(value, f"{what}: files").items():
        check_file_name(name, what)
        if name == MANIFEST or name in ANNOTATIONS:
            raise ArtifactError(f"{what}: {name} may not be listed; it is not part of the content")
        other = folded.setdefault(name.casefold(), name)
        _require(other == name, f"{what}: {other!r} and {name!r} are one file where case does not count")
        row = _object(entry, f"{what}: the entry of {name!r}")
        complete = set(row) == {"sha256", "size_bytes"}
        _require(complete, f"{what}: the entry of {name!r} must hold sha256 and size_bytes")
        sha256 = check_id(row["sha256"], f"{what}: sha256 of {name!r}")
        files[name] = FileEntry(sha256, _integer(row["size_bytes"], f"{what}: size_bytes of {name!r}"))
    for name in files:
        for folder in PurePosixPath(name).parents:
            _require(str(folder) not in files, f"{what}: {str(folder)!r} is listed both as a file and as a folder")
    return files
