"""Which files are GGUF models, what their headers may claim, and what is refused before a weight is read."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys

import pytest
from gguf_files import CASES, network, write_file

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.tasks import foreign_files
from gulliver.tasks.language.gguf.config import checked
from gulliver.tasks.language.gguf.header import read_header
from gulliver.tasks.language.gguf.read import convert_gguf

CASE = CASES["llama"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("whole") / "Model.gguf", network(CASE), CASE)


@pytest.fixture
def parts(tmp_path):
    write_file(tmp_path / "m.gguf", network(CASE), CASE, split=8)
    return sorted(tmp_path.glob("*.gguf"))


def test_any_part_of_a_split_file_names_all(parts, tmp_path):
    assert len(parts) == 3
    for part in parts:
        assert foreign_files(part) == tuple(parts)
    assert foreign_files(tmp_path) == tuple(parts)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert convert_gguf(parts[1], folder).files == tuple(parts)


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    with pytest.raises(ArtifactError, match=parts[1].name):
        read_header(parts[2])


def test_a_part_that_was_renamed_says_what_is_wrong(parts, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(ArtifactError, match="split into 3 files"):
        read_header(shutil.copy(parts[0], alone / "model.gguf"))


@pytest.mark.parametrize("name", ["model", "MODEL.GGUF", "model.bin"])
def test_a_model_is_known_by_its_first_letters(whole, tmp_path, name):
    shutil.copy(whole, tmp_path / name)
    assert foreign_files(tmp_path / name) == foreign_files(tmp_path) == (tmp_path / name,)


def test_a_folder_of_several_models_asks_which(whole, tmp_path):
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        shutil.copy(whole, tmp_path / name)
    with pytest.raises(ConfigError, match=r"a\.gguf, b\.gguf"):
        foreign_files(tmp_path)


def changed(whole, tmp_path, at, data):
    body = bytearray(whole.read_bytes())
    body[at : at + len(data)] = data
    path = tmp_path / "changed.gguf"
    path.write_bytes(body)
    return path


@pytest.mark.parametrize(
    ("at", "data", "told"),
    [
        (0, b"GGML", "letters GGUF"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**60), "bytes for"),
        (16, struct.pack("<Q", 2**60), "bytes for"),
    ],
)
def test_a_header_that_claims_too_much_is_refused(whole, tmp_path, at, data, told):
    with pytest.raises(ArtifactError, match=told):
        checked(changed(whole, tmp_path, at, data))


def test_a_key_that_changes_the_arithmetic_is_used_or_refused(tmp_path):
    def scaled(writer):
        writer.add_float32("llama.attention.temperature_scale", 0.5)

    def neutral(writer):
        writer.add_float32("llama.residual_scale", 1.0)

    with pytest.raises(ArtifactError, match="temperature_scale is"):
        checked(write_file(tmp_path / "a.gguf", network(CASE), CASE, change=scaled))
    checked(write_file(tmp_path / "b.gguf", network(CASE), CASE, change=neutral))


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (15, "the type Q8_K, which"),
        (33, "the type Q4_0_8_8, which"),
        (146, r"the type IQ4_KSS of ik_llama\.cpp"),
        (230, "type number 230, a type of another fork"),
    ],
)
def test_a_type_that_is_not_read_is_called_by_its_name(whole, tmp_path, number, told):
    name = b"output_norm.weight"
    at = whole.read_bytes().index(name) + len(name) + 4 + 8  # one dimension, then the type
    with pytest.raises(ArtifactError, match=told):
        read_header(changed(whole, tmp_path, at, struct.pack("<I", number)))


@pytest.mark.parametrize(
    ("kind", "told"), [("adapter", r"an adapter \(LoRA\)"), ("mmproj", "sees or hears"), ("imatrix", "importance")]
)
def test_a_file_that_goes_with_a_model_is_called_what_it_is(tmp_path, kind, told):
    def typed(writer):
        writer.add_type(kind)

    with pytest.raises(ArtifactError, match=told):
        checked(write_file(tmp_path / "a.gguf", network(CASE), CASE, change=typed))


def test_a_file_is_checked_without_torch(whole):
    code = (
        "import sys; from pathlib import Path; from gulliver.tasks import foreign_files;"
        f"foreign_files(Path({str(whole)!r})); print({{'torch', 'transformers', 'gguf', 'numpy'}} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
