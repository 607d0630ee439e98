"""Artifacts: same content same id, whole or absent, verified, copied."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import CONTENT, make, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.store.artifact import (
    Artifact,
    canonical_json,
    copy_artifact,
    create,
    hash_file,
    open_artifact,
    verify,
    write_annotation,
)
from gulliver.core.store.files import sweep


# ---- writing ------------------------------------------------------------------------------------------------------
def test_a_committed_artifact_reads_back(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    assert artifact.path == tmp_path / artifact.id
    assert (artifact.kind, artifact.task, artifact.seed) == ("model", "language", 7)
    assert (artifact.inputs, artifact.parents) == ({"model": ("a" * 64,)}, ("a" * 64,))
    assert artifact.step == {"name": "quantize", "version": 2}
    assert artifact.config == {"bits": 4, "damping": 0.01}
    assert sorted(artifact.files) == sorted(CONTENT)
    assert artifact.weight_bytes == 111
    assert artifact.file("head/more.safetensors").read_bytes() == b"h" * 11
    assert artifact.files["config.json"].sha256 == hash_file(artifact.path / "config.json")
    assert open_artifact(artifact.path) == artifact
    assert artifact.manifest == json.loads((artifact.path / "gulliver.json").read_bytes())
    verify(artifact)


def test_the_id_depends_on_content_and_origin_only(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    assert make(tmp_path / "b", dict(reversed(CONTENT.items()))).id == first.id
    changes: list[dict[str, Any]] = [
        {"content": {**CONTENT, "config.json": b"{ }"}},
        {"seed": 8},
        {"config": {"bits": 3, "damping": 0.01}},
        {"step": {"name": "quantize", "version": 3}},
        {"inputs": {"model": ["b" * 64]}},
        {"inputs": {"parent": ["a" * 64]}},
        {"inputs": {}},
        {"task": "vision"},
        {"kind": "report"},
    ]
    ids = {make(tmp_path / "c", **change).id for change in changes}
    assert len(ids) == len(changes) and first.id not in ids


def test_writing_the_same_again_keeps_the_first(tmp_path: Path) -> None:
    first = make(tmp_path)
    write_annotation(first, "README.md", "card")
    inode = (first.path / "gulliver.json").stat().st_ino
    assert make(tmp_path) == first
    assert (first.path / "gulliver.json").stat().st_ino == inode
    assert (first.path / "README.md").read_text() == "card"
    assert [path.name for path in tmp_path.iterdir()] == [first.id]


def test_writing_again_replaces_a_damaged_one(tmp_path: Path) -> None:
    first = make(tmp_path)
    (first.path / "model.safetensors").write_bytes(b"short")
    verify(make(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [first.id]


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        create(tmp_path, kind="model", task="language", step={"name": "s", "version": 1}, config={}) as writer,
    ):
        (writer.path / "half").write_bytes(b"x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from gulliver.core.store.artifact import create\n"
        "kept = create(sys.argv[1], kind='model', task='language', step={'name': 's', 'version': 1}, config={})\n"
        "w = kept.__enter__(); (w.path / 'half').write_bytes(b'x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (dead,) = tmp_path.iterdir()
    with create(tmp_path, kind="model", task="language", step={"name": "s", "version": 1}, config={}) as living:
        (living.path / "x").write_bytes(b"x")
        assert sweep(tmp_path) == [dead]
        verify(living.commit())
    assert sweep(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "modle"}, "did you mean 'model'"),
        ({"task": "Language Models"}, "lower-case"),
        ({"inputs": {"model": ["abc"]}}, "64 hex digits"),
        ({"inputs": {"the model": ["a" * 64]}}, "plain lower-case name"),
        ({"inputs": {"model": ["a" * 64] * 2}}, "duplicate id"),
        ({"step": {"name": "s"}}, "name and version"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_writer_refuses_a_wrong_manifest_at_once(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        make(tmp_path, **change)


def test_an_input_in_two_roles_is_one_parent_and_several_keep_their_order(tmp_path: Path) -> None:
    made = make(tmp_path, inputs={"parent": ["a" * 64], "models": ["c" * 64, "a" * 64, "b" * 64]})
    assert made.inputs["models"] == ("c" * 64, "a" * 64, "b" * 64)
    assert made.parents == ("c" * 64, "a" * 64, "b" * 64)
    other = make(tmp_path, inputs={"parent": ["a" * 64], "models": ["b" * 64, "a" * 64, "c" * 64]})
    assert other.id != made.id


def test_an_artifact_of_format_1_opens_verifies_and_is_copied_as_it_is(tmp_path: Path) -> None:
    made = make(tmp_path)

    def before_roles(body: dict[str, Any]) -> None:
        del body["inputs"]
        body.update(format=1, parents=["b" * 64, "a" * 64])

    rewrite(made, before_roles)
    old = open_artifact(made.path)
    assert old.inputs == {"": ("b" * 64, "a" * 64)} and old.parents == ("b" * 64, "a" * 64)
    assert old.id != made.id and old.manifest == json.loads((made.path / "gulliver.json").read_bytes())
    verify(old)
    assert copy_artifact(old, tmp_path / "copy").id == old.id


def test_a_writer_refuses_links_and_its_own_manifest(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    options: dict[str, Any] = {"kind": "model", "task": "language", "step": {"name": "s", "version": 1}, "config": {}}
    with create(tmp_path / "a", **options) as writer:
        (writer.path / "link").symlink_to(tmp_path / "outside")
        with pytest.raises(ArtifactError, match="link is a symbolic link"):
            writer.commit()
    with create(tmp_path / "a", **options) as writer:
        (writer.path / "gulliver.json").write_text("{}")
        with pytest.raises(ArtifactError, match=r"gulliver\.json may not be listed"):
            writer.commit()


# ---- canonical JSON -----------------------------------------------------------------------------------------------
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aé\"\\\n\x00€𝄞", max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abé€", max_size=3), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(JSON)
def test_canonical_json_is_a_function_of_the_value(value: Any) -> None:
    data = canonical_json(value)
    assert canonical_json(json.loads(data)) == data
    assert json.loads(data) == value


def test_canonical_json_sorts_and_refuses_what_is_not_json() -> None:
    assert (
        canonical_json({"b": 1, "a": {"d": "é", "c": [1.5, None]}}) == '{"a":{"c":[1.5,null],"d":"é"},"b":1}'.encode()
    )
    for wrong in (float("nan"), float("inf"), {1, 2}, Path("x"), "\ud800"):
        with pytest.raises(ConfigError, match="cannot be written as JSON"):
            canonical_json({"value": wrong})


# ---- verification -------------------------------------------------------------------------------------------------
def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Artifact], object], str]] = {
    "flipped bit": (lambda a: _flip(a.path / "model.safetensors"), "model.safetensors differs; SHA-256"),
    "cut short": (lambda a: (a.path / "model.safetensors").write_bytes(b"w" * 99), "has 99 bytes, listed are 100"),
    "missing": (lambda a: (a.path / "config.json").unlink(), r"config\.json is missing"),
    "extra": (lambda a: (a.path / "zzz.py").write_text("import os"), r"zzz\.py is extra"),
    "extra below": (lambda a: (a.path / "head/x").write_text("x"), "head/x is extra"),
    "first of two": (lambda a: [_flip(a.path / name) for name in sorted(CONTENT)[1:]], "head/more"),
    "a folder instead": (lambda a: _become_folder(a.path / "config.json"), "is not a file"),
    "a pipe": (lambda a: os.mkfifo(a.path / "pipe"), "pipe is neither a file nor a folder"),
    "another manifest": (lambda a: rewrite(a, lambda m: m.update(seed=8)), r"gulliver\.json was replaced"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_names_the_first_file_that_differs(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    artifact = make(tmp_path)
    damage(artifact)
    with pytest.raises(ArtifactError, match=message):
        verify(artifact)


@pytest.mark.parametrize("target", ["/etc/hostname", "../../outside", "model.safetensors"])
def test_links_are_refused_wherever_they_point(tmp_path: Path, target: str) -> None:
    artifact = make(tmp_path / "store")
    (tmp_path / "outside").write_bytes(b"{}")
    (artifact.path / "config.json").unlink()
    (artifact.path / "config.json").symlink_to(target)
    for use in (verify, lambda a: a.file("config.json"), lambda a: copy_artifact(a, tmp_path / "copy")):
        with pytest.raises(ArtifactError, match=r"config\.json is a symbolic link"):
            use(artifact)
    assert not (tmp_path / "copy").exists()


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    artifact = make(tmp_path / "store")
    (artifact.path / "head").rename(tmp_path / "elsewhere")
    (artifact.path / "head").symlink_to(tmp_path / "elsewhere")
    for use in (verify, lambda a: a.file("head/more.safetensors")):
        with pytest.raises(ArtifactError, match="symbolic link"):
            use(artifact)


def test_annotations_are_not_content(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    for text in ("first", "second"):
        write_annotation(artifact, "README.md", text)
        write_annotation(artifact, "evidence.json", b"[]")
    (artifact.path / "report.html.tmp-0123").write_text("left by a killed process")
    verify(artifact)
    assert (artifact.path / "README.md").read_text() == "second"
    with pytest.raises(AssertionError):
        write_annotation(artifact, "config.json", "{}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other.bin", "has no file 'other.bin'"),
        ("../x", "leaves the folder"),
        ("/etc/passwd", "absolute"),
        ("", "empty"),
    ],
)
def test_file_gives_listed_names_only(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        make(tmp_path).file(name)


def test_file_sees_missing_and_short_files(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    (artifact.path / "config.json").write_bytes(b"{")
    with pytest.raises(ArtifactError, match="has 1 bytes, listed are 2"):
        artifact.file("config.json")
    (artifact.path / "config.json").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        artifact.file("config.json")


# ---- copying ------------------------------------------------------------------------------------------------------
def test_a_copy_is_the_same_artifact(tmp_path: Path) -> None:
    artifact = make(tmp_path / "store")
    write_annotation(artifact, "README.md", "card")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (tmp_path / "new" / "deep", empty):
        copy = copy_artifact(artifact, folder)
        assert copy.id == artifact.id and copy.path == folder
        assert (folder / "README.md").read_text() == "card"
        verify(copy)
    write_annotation(artifact, "README.md", "newer card")
    copy_artifact(artifact, empty)
    assert (empty / "README.md").read_text() == "newer card"


def test_a_copy_refuses_other_folders_and_damage(tmp_path: Path) -> None:
    artifact, other = make(tmp_path / "store"), make(tmp_path / "store", seed=9)
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty and is not an artifact"):
        copy_artifact(artifact, used)
    with pytest.raises(ArtifactError, match="is a file"):
        copy_artifact(artifact, used / "thesis.tex")
    copy_artifact(other, tmp_path / "other")
    with pytest.raises(ArtifactError, match="holds another artifact"):
        copy_artifact(artifact, tmp_path / "other")
    _flip(artifact.path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors differs"):
        copy_artifact(artifact, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "store", "used"]
