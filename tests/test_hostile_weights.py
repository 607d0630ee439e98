"""Hostile weight files through the native path: each is refused with an error of ours, or it runs.

What `runtime/reference.py` refuses is in test_reference.py; here stand the header of the weight file and the bytes that
native code is given.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_samples import WEIGHTS, Header, join, refused, run, split, tensors_of, tried, write_models
from torch import Tensor

from gulliver.core.store.manifest import PACKING
from gulliver.nets.files import MAX_DIMENSIONS
from gulliver.runtime import decode
from gulliver.runtime.decode import native_reason
from gulliver.runtime.formats import Format
from gulliver.runtime.shards import write_file

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the packed Llama, to be damaged."""
    return shutil.copytree(models["llama"], tmp_path / "model")


# ---- the header ----------------------------------------------------------------------------------------------------
def instead(key: str, value: Any) -> Callable[[Header], Any]:
    return lambda header: header[NORM].__setitem__(key, value)


def overlap(header: Header) -> None:
    other = NORM.replace("layers.1", "layers.2")
    header[NORM]["data_offsets"] = header[other]["data_offsets"]


def same_place(header: Header) -> None:
    header["spare"] = dict(header[NORM])


HEADERS: dict[str, Callable[[Header], Any]] = {
    "overlap": overlap,
    "one place twice": same_place,
    "hole": lambda header: header.pop(NORM),
    "no tensors": lambda header: header.clear(),
    "metadata that is not text": lambda header: header.__setitem__("__metadata__", {"a": 1}),
    **{f"offsets {value}"[:50]: instead("data_offsets", value) for value in (
        [0, 2**62],
        [2**62, 2**62 + 288], [-288, 0], [288, 0], [0.0, 288.0], [False, 288], [0], [], None, "0-288", {}, [0, 1, 2]
    )},
    **{f"shape {value}"[:50]: instead("shape", value) for value in (
        [2**62, 2**62], [0], [-72], [71], [72.0], [True], "72", None, {}, [[72]], [1] * (MAX_DIMENSIONS + 1) + [72],
        [2**63 - 1] * 10**5,
    )},
    **{f"dtype {value}"[:50]: instead("dtype", value) for value in ("F64", "F4", "f32", "I8", "", 5, [], ["F32"])},
    "a spare key": instead("note", 1),
    "no shape": lambda header: header[NORM].pop("shape"),
    "a row that is a list": lambda header: header.__setitem__(NORM, []),
    "metadata a tensor": lambda header: header.__setitem__("__metadata__", header.pop(NORM)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused(folder: Path, name: str) -> None:
    header, body = split(folder / WEIGHTS)
    HEADERS[name](header)
    join(folder / WEIGHTS, header, body)
    refused(folder)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "header cut": lambda data: data[:100],
    "body cut": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    "length zero": lambda data: struct.pack("<Q", 0) + data[8:],
    "length beyond the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "length huge": lambda data: struct.pack("<Q", 2**64 - 1) + data[8:],
    "length negative": lambda data: struct.pack("<q", -8) + data[8:],
    "length less": lambda data: struct.pack("<Q", struct.unpack("<Q", data[:8])[0] - 64) + data[8:],
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused(folder: Path, name: str) -> None:
    path = folder / WEIGHTS
    path.write_bytes(FILES[name](path.read_bytes()))
    refused(folder)


def test_a_folder_in_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refused(folder, "no \\*.safetensors")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, "no config.json")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../x"}}', "[" * 10**5]
    + [f'{{"weight_map": {{"a": "{name}"}}}}' for name in ("..", "", "\\u0000", "absent.safetensors", "/etc/passwd")],
    ids=lambda text: text[:40],
)
def test_a_hostile_index_is_refused(folder: Path, text: str) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")  # beside WEIGHTS no index is looked at
    (folder / f"{WEIGHTS}.index.json").write_text(text)
    refused(folder)


# ---- packed weights -----------------------------------------------------------------------------------------------
def in_packing(name: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["tensors"][name].update(values)


def part(fmt: str, rows: Any) -> list[dict[str, Any]]:
    return [{"format": fmt, "rows": rows}]


PACKINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "fewer columns": in_packing(QUERY, shape=[120, 71]),
    "more rows": in_packing(QUERY, shape=[136, 72], parts=part("u6g64", 136)),
    "huge rows": in_packing(QUERY, shape=[2**62, 72], parts=part("u6g64", 2**62)),
    "huge columns": in_packing(QUERY, shape=[120, 2**62]),
    "another dimension": in_packing(QUERY, shape=[120, 72, 1]),
    "a wider format": in_packing(QUERY, parts=part("u8g128", 120)),
    "parts of no rows": in_packing(QUERY, parts=part("u6g64", 120) + part("u6g64", 0)),
    "rows that are negative": in_packing(QUERY, parts=part("u6g64", -120)),
    "another part": in_packing(QUERY, parts=part("u6g64", 60) + part("u6g64", 60)),
    "no such weight": lambda body: body["tensors"].update({"model.layers.9.x": body["tensors"][QUERY]}),
    "a weight less": lambda body: body["tensors"].pop(QUERY),
    "stored both ways": lambda body: body["tensors"].update({NORM: body["tensors"][QUERY]}),
    "no weights": lambda body: body.update(tensors={}),
    "another format": lambda body: body.update(format=2),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_a_hostile_packing_is_refused(folder: Path, name: str) -> None:
    body = json.loads((folder / PACKING).read_text())
    PACKINGS[name](body)
    (folder / PACKING).write_text(json.dumps(body))
    refused(folder)


def with_factor(value: float, row: int) -> Callable[[Tensor], Tensor]:
    """The first part of the embedding, whose format is c6g32, with another factor of one row of its last tile."""

    def change(tiles: Tensor) -> Tensor:
        at = Format.parse("c6g32").factors_at(72) + 2 * row
        tiles[-1, at : at + 2] = torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8)
        return tiles

    return change


def filled(value: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


BAD_WEIGHTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a factor that is not a number": (f"{EMBEDDING}.tiles.0", with_factor(float("nan"), 0)),
    "an infinite factor": (f"{EMBEDDING}.tiles.0", with_factor(float("-inf"), 0)),
    "a longer codebook": (f"{EMBEDDING}.codebook.0", lambda table: torch.cat([table, table])),
    "a shorter codebook": (f"{EMBEDDING}.codebook.0", lambda table: table[:-1].clone()),
    "a codebook without signs": (f"{EMBEDDING}.codebook.0", lambda table: table.view(torch.uint8)),
    "an empty codebook": (f"{EMBEDDING}.codebook.0", lambda table: table[:0].clone()),
    "a table of two dimensions": (f"{EMBEDDING}.codebook.0", lambda table: table.view(1, -1).clone()),
    "rows of no part": (f"{EMBEDDING}.rows", filled(255)),
    "rows of one part": (f"{EMBEDDING}.rows", filled(0)),
    "one row astray": (f"{EMBEDDING}.rows", lambda rows: torch.cat([(rows[:1] + 1) % 3, rows[1:]])),
    "rows cut": (f"{EMBEDDING}.rows", lambda rows: rows[:-1].clone()),
    "wider rows": (f"{EMBEDDING}.rows", lambda rows: rows.short()),
    "tiles cut": (f"{EMBEDDING}.tiles.1", lambda tiles: tiles[:-1].clone()),
    "flat tiles": (f"{EMBEDDING}.tiles.1", lambda tiles: tiles.flatten()),
    "signed tiles": (f"{EMBEDDING}.tiles.1", lambda tiles: tiles.view(torch.int8)),
    "no tiles": (f"{EMBEDDING}.tiles.1", lambda tiles: tiles[:0].clone()),
    "a norm of whole numbers": (NORM, lambda norm: norm.int()),
    "a norm as a matrix": (NORM, lambda norm: norm.view(1, -1).clone()),
}


def rewrite(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = tensors_of(folder)
    tensors[name] = change(tensors[name]).contiguous()
    write_file(folder / WEIGHTS, tensors)


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_hostile_weights_are_refused(folder: Path, name: str) -> None:
    rewrite(folder, *BAD_WEIGHTS[name])
    refused(folder)


@pytest.mark.parametrize("value", [0, 255], ids=["zeros", "the largest codes"])
def test_numbers_at_the_end_of_their_range_run(folder: Path, value: int) -> None:
    tensors = tensors_of(folder)
    packing = json.loads((folder / PACKING).read_text())["tensors"]
    for name, row in packing.items():
        for index, described in enumerate(row["parts"]):
            tiles = tensors[f"{name}.tiles.{index}"]
            tiles[:, : Format.parse(described["format"]).factors_at(row["shape"][1])] = value
    write_file(folder / WEIGHTS, tensors)
    assert np.isfinite(run(folder)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_vectors_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    rewrite(folder, NORM, lambda norm: torch.full_like(norm, value))
    refused(folder, f"{NORM}.*not finite")


def test_vectors_near_the_end_of_their_range_run(folder: Path) -> None:
    """Logits are garbage then, and no more than that: whoever samples must bear it."""
    rewrite(folder, NORM, lambda norm: torch.full_like(norm, 3e38))
    assert tried(folder)


def test_a_factor_of_padding_is_not_looked_at(folder: Path) -> None:
    rows = json.loads((folder / PACKING).read_text())["tensors"][EMBEDDING]["parts"][0]["rows"]
    assert rows % 16
    rewrite(folder, f"{EMBEDDING}.tiles.0", with_factor(float("nan"), 15))
    assert np.isfinite(run(folder)).all()


# ---- weights in place -------------------------------------------------------------------------------------------
@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, weights are left where they lie in their files: no machine has less memory."""
    return lambda: monkeypatch.setattr(decode, "total_ram_bytes", lambda: 1)


@pytest.mark.parametrize("spaces", [0, 1, 2, 4, 32])
def test_tiles_may_begin_anywhere_in_a_file(folder: Path, in_place: Callable[[], None], spaces: int) -> None:
    wanted = run(folder)
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length] + b" " * spaces
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    in_place()
    np.testing.assert_allclose(run(folder), wanted, atol=2e-4)


def test_a_factor_that_is_not_finite_is_refused_in_place_too(folder: Path, in_place: Callable[[], None]) -> None:
    rewrite(folder, f"{EMBEDDING}.tiles.0", with_factor(float("nan"), 0))
    in_place()
    refused(folder, "not finite")


def test_numbers_that_are_split_are_refused_in_place_and_read_otherwise(
    models: dict[str, Path], tmp_path: Path, in_place: Callable[[], None]
) -> None:
    folder = shutil.copytree(models["plain"], tmp_path / "model")
    header, body = split(folder / WEIGHTS)
    text = json.dumps(header).encode()
    text += b" " * ((1 - len(text)) % 4)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + body)
    wanted = run(folder)
    in_place()
    refused(folder, "is not aligned")
    write_file(folder / WEIGHTS, tensors_of(folder))
    np.testing.assert_allclose(run(folder), wanted, atol=2e-4)
