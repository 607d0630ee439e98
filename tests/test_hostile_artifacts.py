"""Hostile artifacts: every kind of manifest and of bytes that must be refused, each with an error of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import make, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st

from gulliver.core.errors import ArtifactError
from gulliver.core.store.artifact import canonical_json, open_artifact
from gulliver.core.store.manifest import MAX_MANIFEST_BYTES, manifest_id, parse


def entry(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["files"].__setitem__(name, m["files"]["config.json"])


def old(body: dict[str, Any], parents: Any) -> None:
    """The manifest as format 1 had it."""
    del body["inputs"]
    body.update(format=1, parents=parents)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "traversal": (entry("../outside"), "leaves the folder"),
    "deep traversal": (entry("head/../../outside"), "leaves the folder"),
    "absolute": (entry("/etc/passwd"), "is absolute"),
    "windows absolute": (entry("C:evil"), "backslash, a colon or a control"),
    "backslash": (entry("..\\evil"), "backslash, a colon or a control"),
    "zero byte": (entry("a\0b"), "backslash, a colon or a control"),
    "new line": (entry("a\nb"), "backslash, a colon or a control"),
    "not plain": (entry("./config.json"), "not in plain form"),
    "double slash": (entry("a//b"), "not in plain form"),
    "empty name": (entry(""), "empty or not text"),
    "endless name": (entry("a" * 2000), "over 1024 bytes"),
    "two names for one file": (entry("CONFIG.json"), "one file where case does not count"),
    "file and folder": (entry("config.json/inner"), "both as a file and as a folder"),
    "lists itself": (entry("gulliver.json"), "may not be listed"),
    "lists an annotation": (entry("README.md"), "may not be listed"),
    "no format": (lambda m: m.pop("format"), "the key 'format' is missing"),
    "newer format": (lambda m: m.update(format=3), "upgrade"),
    "format true": (lambda m: m.update(format=True), "format is True"),
    "unknown key": (lambda m: m.update(inptus=[]), "did you mean 'inputs'"),
    "missing key": (lambda m: m.pop("files"), "the key 'files' is missing"),
    "unknown kind": (lambda m: m.update(kind="weights"), "unknown kind 'weights'"),
    "kind a list": (lambda m: m.update(kind=[]), "unknown kind"),
    "task a number": (lambda m: m.update(task=3), "task is 3"),
    "format 0": (lambda m: m.update(format=0), "format is 0"),
    "parents in format 2": (lambda m: m.update(parents=["a" * 64]), "unknown key 'parents'"),
    "inputs a list": (lambda m: m.update(inputs=["a" * 64]), "inputs must be a JSON object"),
    "role a path": (lambda m: m.update(inputs={"../x": ["a" * 64]}), "not a plain lower-case name"),
    "role empty": (lambda m: m.update(inputs={"": ["a" * 64]}), "not a plain lower-case name"),
    "input text": (lambda m: m.update(inputs={"model": "a" * 64}), "input model must be a list"),
    "input empty": (lambda m: m.update(inputs={"model": []}), "input model is an empty list"),
    "input a path": (lambda m: m.update(inputs={"model": ["../" * 21 + "x"]}), "not 64 hex digits"),
    "input twice": (lambda m: m.update(inputs={"model": ["a" * 64] * 2}), "duplicate id"),
    "inputs in format 1": (lambda m: m.update(format=1), "unknown key 'inputs'"),
    "format 1 parents text": (lambda m: old(m, "a" * 64), "parents must be a list"),
    "format 1 parent a path": (lambda m: old(m, ["../" * 21 + "x"]), "not 64 hex digits"),
    "format 1 parent twice": (lambda m: old(m, ["a" * 64] * 2), "duplicate id"),
    "step extra": (lambda m: m["step"].update(code="x"), "name and version"),
    "version text": (lambda m: m["step"].update(version="2"), "step version must be a whole number"),
    "config a list": (lambda m: m.update(config=[]), "config must be a JSON object"),
    "seed a float": (lambda m: m.update(seed=1.0), "seed must be a whole number"),
    "files a list": (lambda m: m.update(files=[]), "files must be a JSON object"),
    "entry a number": (lambda m: m["files"].update({"config.json": 3}), "must be a JSON object"),
    "entry short": (lambda m: m["files"]["config.json"].pop("sha256"), "must hold sha256 and size_bytes"),
    "hash in capitals": (lambda m: m["files"]["config.json"].update(sha256="A" * 64), "not 64 hex digits"),
    "negative size": (lambda m: m["files"]["config.json"].update(size_bytes=-1), "must lie between 0"),
    "size true": (lambda m: m["files"]["config.json"].update(size_bytes=True), "must be a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_have_an_error_of_their_own(tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    artifact = make(tmp_path)
    rewrite(artifact, change)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(artifact.path)


RAW: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not valid JSON"),
    "truncated": (lambda data: data[: len(data) // 2], "not valid JSON"),
    "not UTF-8": (lambda data: b"\xff\xfe" + data, "not UTF-8"),
    "a list": (lambda data: b"[]", "must be a JSON object"),
    "key twice": (lambda data: data.replace(b'"seed":7', b'"seed":7,"seed":8'), "duplicate key 'seed'"),
    "file twice": (lambda data: data.replace(b'"config.json":{', b'"config.json":1,"config.json":{'), "duplicate key"),
    "huge number": (lambda data: data.replace(b'"seed":7', b'"seed":' + b"9" * 5000), "does not fit in 64 bits"),
    "huge float": (lambda data: data.replace(b"0.01", b"1e999"), "not finite"),
    "NaN": (lambda data: data.replace(b"0.01", b"NaN"), "not finite"),
    "deep": (lambda data: data.replace(b"0.01", b"[" * 100_000 + b"]" * 100_000), "nested too deep"),
    "oversized": (lambda data: data + b" " * MAX_MANIFEST_BYTES, "at most"),
    "half a character": (lambda data: data.replace(b'"config":{', b'"config":{"x":"\\ud800",'), "it is damaged"),
    "990 lists": (lambda data: data.replace(b"0.01", b"[" * 990 + b"]" * 990), "damaged|too deep"),
    "other id": (lambda data: data.replace(b'"seed":7', b'"seed":8'), "it was changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_hostile_bytes_have_an_error_of_their_own(tmp_path: Path, name: str) -> None:
    change, message = RAW[name]
    artifact = make(tmp_path)
    path = artifact.path / "gulliver.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(artifact.path)


BODY: dict[str, Any] = {
    "format": 2,
    "kind": "model",
    "task": "language",
    "inputs": {"model": ["a" * 64]},
    "step": {"name": "quantize", "version": 2},
    "config": {"bits": 4, "damping": 0.01},
    "seed": 7,
    "files": {"config.json": {"sha256": "b" * 64, "size_bytes": 2}},
}
BODY["id"] = manifest_id(BODY)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_no_cut_and_no_flip_goes_unseen(data: st.DataObject) -> None:
    raw = canonical_json(BODY)
    good = parse(raw)
    with pytest.raises(ArtifactError):
        parse(raw[: data.draw(st.integers(0, len(raw) - 1))])
    changed = bytearray(raw)
    changed[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = parse(bytes(changed))
    except ArtifactError:
        return
    assert found.id == good.id and found.files == good.files and found.config == good.config


def test_folders_that_are_no_artifacts(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        open_artifact(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"holds no gulliver\.json"):
        open_artifact(tmp_path)
    artifact = make(tmp_path / "store")
    (tmp_path / "gulliver.json").symlink_to(artifact.path / "gulliver.json")
    with pytest.raises(ArtifactError, match=r"holds no gulliver\.json"):
        open_artifact(tmp_path)
