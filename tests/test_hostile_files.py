"""A stranger's folder is data: links, pipes and devices are not opened, sizes are checked before anything is built."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from language_samples import write_causal, write_encoder
from test_gguf import write_gguf

from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.foreign import foreign
from gulliver.data.options import PullOptions, ReadOptions
from gulliver.data.pull import run as pull
from gulliver.data.read import run as read
from gulliver.pipeline import recipe
from gulliver.tasks import detect_task, get_task
from gulliver.tasks.vision.examples import read_split

SECRET = "TOP-SECRET-KEY-42"


@pytest.fixture
def ctx(store, quiet):
    from gulliver.core.context import Context

    return Context(store=store, progress=quiet, work=store.work("0" * 64), step="pull")


def brought(ctx, source):
    return pull(PullOptions.model_validate({"source": str(source)}), {}, ctx)


def secret(folder: Path) -> Path:
    """A file outside every model's folder."""
    path = folder / "id_rsa"
    path.write_text(SECRET)
    return path


# ---- links, pipes, devices ------------------------------------------------------------------------------------------
def linked_pooling(folder: Path, outside: Path) -> None:
    (outside.parent / "pooling").mkdir()
    (outside.parent / "pooling" / "config.json").write_text("{}")
    (folder / "1_Pooling").symlink_to(outside.parent / "pooling")


def a_socket(folder: Path, outside: Path) -> None:
    here = os.getcwd()
    os.chdir(folder)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("vocab.txt")
    finally:
        os.chdir(here)


def moved_out(name: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, outside: Path) -> None:
        shutil.move(folder / name, outside.parent / name)
        (folder / name).symlink_to(outside.parent / name)

    return change


def piped(name: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


TRAPS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a companion": (lambda folder, outside: (folder / "notes.txt").symlink_to(outside), "leads out of its folder"),
    "upwards": (lambda folder, outside: (folder / "notes.txt").symlink_to("../id_rsa"), "leads out of its folder"),
    "a device": (lambda folder, outside: (folder / "extra.json").symlink_to("/dev/zero"), "leads out of its folder"),
    "nothing": (lambda folder, outside: (folder / "extra.json").symlink_to("gone"), "link to nothing"),
    "the pooling's folder": (linked_pooling, "leads out of its folder"),
    "the weights": (moved_out("model.safetensors"), "leads out of its folder"),
    "the tokenizer": (moved_out("tokenizer.json"), "leads out of its folder"),
    "a pipe for the config": (piped("config.json"), "is a pipe"),
    "a pipe for the tokenizer": (piped("tokenizer.json"), "is a pipe"),
    "a pipe for the index": (piped("model.safetensors.index.json"), "is a pipe"),
    "a socket": (a_socket, "is a pipe, a socket"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_is_no_plain_file_is_not_opened(name: str, tmp_path: Path, ctx: Any) -> None:
    change, told = TRAPS[name]
    folder, outside = write_causal(tmp_path / "model"), secret(tmp_path)
    change(folder, outside)
    with pytest.raises(ArtifactError, match=told) as refused:
        brought(ctx, folder)
    assert "\n" not in str(refused.value)
    kept = [path for path in ctx.store.home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert kept == [] and list(ctx.store.artifacts_folder.iterdir()) == []


def test_links_that_stay_in_the_folder_and_those_of_the_hub_are_followed(tmp_path: Path, ctx: Any) -> None:
    folder = write_causal(tmp_path / "model")
    made = brought(ctx, folder)
    shutil.move(folder / "tokenizer.json", folder / "one.json")
    (folder / "tokenizer.json").symlink_to("one.json")
    assert brought(ctx, folder).files["tokenizer.json"] == made.files["tokenizer.json"]
    snapshot, blobs = (
        tmp_path / "hub" / "models--a--b" / "snapshots" / "abc",
        tmp_path / "hub" / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(write_causal(tmp_path / "again").iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "mine").symlink_to(snapshot)  # a link that the user names himself
    for source in (snapshot, tmp_path / "mine"):
        assert brought(ctx, source).files["model.safetensors"] == made.files["model.safetensors"]
    (snapshot / "notes.txt").symlink_to(secret(tmp_path))
    with pytest.raises(ArtifactError, match="leads out"):
        brought(ctx, snapshot)


def test_a_gguf_and_its_parts_are_plain_files(tmp_path: Path, ctx: Any) -> None:
    whole = write_gguf(tmp_path / "real.gguf", write_causal(tmp_path / "source"))
    (tmp_path / "mine.gguf").symlink_to(whole)
    made = brought(ctx, tmp_path / "mine.gguf")  # named by the user
    assert made.kind == "model"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(whole)
    with pytest.raises(ArtifactError, match="leads out"):
        brought(ctx, folder)
    (folder / "model.gguf").unlink()
    shutil.copy(whole, folder / "m-00001-of-00002.gguf")
    (folder / "m-00002-of-00002.gguf").symlink_to(whole)
    with pytest.raises(ArtifactError, match="leads out"):
        brought(ctx, folder / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    "words", [("generate", "--prompt", "Hi", "--max-tokens", "1"), ("ask",)], ids=["generate", "ask"]
)
def test_a_folder_that_is_used_without_pull_is_looked_at_too(words, tmp_path: Path, command: Any) -> None:
    folder = write_causal(tmp_path / "model")
    (folder / "notes.txt").symlink_to(secret(tmp_path))
    code, _, told = command(words[0], folder, *(words[1:] or ("Hi",)))
    assert code == 2 and "leads out of its folder" in told and "Traceback" not in told


@pytest.mark.parametrize("trap", ["link", "pipe"])
def test_a_folder_of_data_is_plain_files(trap: str, tmp_path: Path, ctx: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("one text of some length\n\n" * 40)
    if trap == "link":
        (folder / "b.txt").symlink_to(secret(tmp_path))
    else:
        os.mkfifo(folder / "b.txt")
    with pytest.raises(DataError, match=r"leads out|is a pipe"):
        read(ReadOptions.model_validate({"data": str(folder)}), {}, ctx)


# ---- sizes ----------------------------------------------------------------------------------------------------------
SIZES: dict[str, Any] = {
    **{"num_hidden_layers": 10**9, "num_labels": 10**9, "hidden_size": 2**31, "intermediate_size": 2**40},
    **{"vocab_size": 10**9, "num_attention_heads": 10**9, "max_position_embeddings": 2**40, "head_dim": 2**40},
    **{"n_layer": 10**9, "id2label": {str(number): "a" for number in range(40_000)}, "text_config": {"layers": 10**9}},
}


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("family", ["language", "encoder"])
def test_a_config_that_asks_for_more_than_there_is_is_refused(key: str, family: str, tmp_path: Path) -> None:
    folder = (write_causal if family == "language" else write_encoder)(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: SIZES[key]}))
    if family == "encoder" and key == "head_dim":
        return  # which a BERT has not
    with pytest.raises(ArtifactError, match=r"can be read|describes|asks for|not a usable") as refused:
        get_task(family).load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [5000, 9999])
def test_layers_are_held_against_the_weights_while_they_are_built(value: int, tmp_path: Path) -> None:
    folder = write_causal(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": value, "layer_types": None}))
    with pytest.raises(ArtifactError, match="far more than the weight files hold"):
        get_task("language").load(folder)


@pytest.mark.parametrize("value", [["bert"], {"a": 1}, 7, None], ids=str)
@pytest.mark.parametrize("key", ["model_type", "architectures", "quantization_config", "is_encoder_decoder"])
def test_a_key_of_another_type_is_no_traceback(key: str, value: Any, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "modules.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    try:
        get_task(detect_task(folder)).load(folder)
    except ArtifactError as refused:
        assert "\n" not in str(refused)
    else:
        assert key in ("quantization_config", "is_encoder_decoder", "architectures")


# ---- weights that are not used --------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["language", "encoder"])
def test_weights_without_a_place_are_named(family: str, tmp_path: Path, ctx: Any) -> None:
    folder = (write_causal if family == "language" else write_encoder)(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ArtifactError, match=r"has no place for .*layers?\.1\..* of \d+ tensors"):
        brought(ctx, folder)


# ---- data and recipes -----------------------------------------------------------------------------------------------
def once(path: Path, **how: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1_000_000] * 100}), path, compression="zstd", **how)


BOMBS: dict[str, Callable[[Path], None]] = {
    "dictionary": once,
    "prefixes": lambda path: once(path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}),
    "pages": lambda path: once(path, use_dictionary=False, data_page_size=2**27),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_parquet_that_unpacks_to_a_lot_is_refused(name: str, tmp_path: Path, ctx: Any) -> None:
    BOMBS[name](tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    with pytest.raises(DataError, match="unpacks to more than"):
        read(ReadOptions.model_validate({"data": str(tmp_path / "a.parquet")}), {}, ctx)


def test_half_a_character_in_a_line_of_json_is_named(tmp_path: Path, ctx: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text":"b"}\n{"text":"\\ud800 hi"}\n')
    with pytest.raises(DataError, match="line 2 holds half a character"):
        read(ReadOptions.model_validate({"data": str(tmp_path / "a.jsonl")}), {}, ctx)


def test_a_gzip_that_unpacks_to_a_lot_is_refused(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "digits.csv.gz", "wb") as stream:
        for _ in range(70):
            stream.write(b"0," * 2**19)
    with pytest.raises(DataError, match="unpacks to more than"):
        read_split(tmp_path / "digits.csv.gz", "train")


@pytest.mark.parametrize(
    "text",
    [
        "a=" + "[" * 500 + "]" * 500,
        "a=" + "{a=" * 500 + "1" + "}" * 500,
        "seed=" + "9" * 5000,
        ".".join("a" * 200_000) + "=1",
        "[" + ".".join("a" * 200_000) + "]",
        " . ".join('"a"' for _ in range(90_000)) + "=1",
        'a="' + "." * 900_000,
        "'''" * 300_000,
        "[[a]]\n" * 100_000,
        "a=[" + "1," * 400_000 + "]",
    ],
    ids=["arrays", "tables", "digits", "dots", "header", "quoted", "text", "quotes", "many", "long"],
)
def test_a_recipe_that_would_take_all_time_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        recipe.load(tmp_path / "r.toml")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1500


def test_dots_in_a_text_are_no_key(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('name = "' + "A sentence. " * 60 + '"\n')
    with pytest.raises(ConfigError, match="has no \\[\\[step\\]\\]"):
        recipe.load(tmp_path / "r.toml")


# ---- the boundary ---------------------------------------------------------------------------------------------------
class Panic(BaseException):
    """What a library in Rust raises is no Exception."""


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (Panic("index out of bounds"), "index out of bounds"),
        (ValueError("two\nlines\x1b[2J"), "two"),
        (ValueError("a field:\n  is wrong"), "a field:   is wrong"),
        (RecursionError(), "nested too deep"),
        (MemoryError(), "more memory"),
        (KeyError(), "KeyError"),
    ],
)
def test_whatever_a_library_raises_is_one_line(raised: BaseException, told: str) -> None:
    with (
        pytest.raises(DataError, match=f"^x.json: .*{told}.*; mend it$") as refused,
        foreign("x.json", DataError, "; mend it"),
    ):
        raise raised
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt(), SystemExit(3), ArtifactError("ours"), OSError(28, "disk full")]
)
def test_what_is_not_the_files_fault_passes(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as passed, foreign("x.json", DataError):
        raise raised
    assert passed.value is raised
