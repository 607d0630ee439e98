"""Packed folders: what was stored is read back, and everything else in its place is refused with its own reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packed import random_part
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.core.records import Packing
from gulliver.core.store.manifest import PACKING
from gulliver.nets.files import stored_tensors
from gulliver.runtime.formats import Format
from gulliver.runtime.packed import PackedTensor
from gulliver.runtime.packing import MAX_PACKING_BYTES, is_packed
from gulliver.runtime.reference import packing_entry, read_stored, read_tensors, stored_form
from gulliver.runtime.shards import ShardWriter

WEIGHTS = "model.safetensors"


def packed(shape: tuple[int, ...], *names: str, seed: int = 0) -> PackedTensor:
    """A random packed weight, its rows dealt out over parts of the named formats, in no even order."""
    random = torch.Generator().manual_seed(seed)
    columns = torch.Size(shape[1:]).numel()
    if len(names) == 1:
        return PackedTensor(shape, [random_part(Format.parse(names[0]), shape[0], columns, seed)])
    row_part = (torch.randperm(shape[0], generator=random) % len(names)).to(torch.uint8)
    counts = torch.bincount(row_part.long(), minlength=len(names)).tolist()
    parts = [
        random_part(Format.parse(name), rows, columns, seed + index)
        for index, (name, rows) in enumerate(zip(names, counts, strict=True))
    ]
    return PackedTensor(shape, parts, row_part)


def write(folder: Path, tensors: dict[str, PackedTensor | Tensor], shard_bytes: int = 10**9) -> Path:
    folder.mkdir(exist_ok=True)
    entries = {}
    with ShardWriter(folder, shard_bytes) as shards:
        for name, tensor in tensors.items():
            if isinstance(tensor, PackedTensor):
                entries[name] = packing_entry(tensor)
            shards.add(stored_form(name, tensor) if isinstance(tensor, PackedTensor) else {name: tensor})
    Packing(tensors=entries).write(folder)
    return folder


MIXED: dict[str, PackedTensor | Tensor] = {
    "embed.weight": packed((40, 33), "c4g64", seed=1),
    "block.0.conv.weight": packed((17, 8, 3, 3), "u3g32", "c5g128", seed=2),
    "block.0.linear.weight": packed((100, 200), "u8g32", "c2g64", "u4g128", "c6g32", seed=3),
    "head.weight": packed((3, 1), "u2g32", seed=4),
    "norm.weight": torch.randn(33, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16),
    "steps": torch.tensor(7),
}


@pytest.mark.parametrize("shard_bytes", [10**9, 10_000, 1])
def test_what_was_stored_is_read_back(tmp_path: Path, shard_bytes: int) -> None:
    folder = write(tmp_path, MIXED, shard_bytes)
    assert is_packed(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    stored = dict(read_stored(folder))
    assert stored.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        found = stored[name]
        if isinstance(tensor, Tensor):
            assert isinstance(found, Tensor) and torch.equal(found, tensor) and found.dtype == tensor.dtype
            continue
        assert isinstance(found, PackedTensor) and found.shape == tensor.shape
        assert [part.format for part in found.parts] == [part.format for part in tensor.parts]
        for mine, theirs in zip(found.parts, tensor.parts, strict=True):
            assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.factors, theirs.factors)
        assert torch.equal(found.dequantize(), tensor.dequantize())


def test_tensors_are_unpacked_to_their_shapes(tmp_path: Path) -> None:
    found = dict(read_tensors(write(tmp_path, MIXED)))
    assert tuple(found["block.0.conv.weight"].shape) == (17, 8, 3, 3)
    assert found["steps"].dtype == torch.int64 and found["norm.weight"].dtype == torch.float32
    for name, tensor in MIXED.items():
        expected = tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor
        assert torch.equal(found[name], expected.to(found[name].dtype))
    halves = dict(read_tensors(tmp_path, torch.bfloat16))
    assert {tensor.dtype for name, tensor in halves.items() if name != "steps"} == {torch.bfloat16}


def test_a_plain_folder_is_read_too(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.float16), "b": torch.tensor([3])}, tmp_path / WEIGHTS)
    assert not is_packed(tmp_path)
    found = dict(read_tensors(tmp_path))
    assert found["a"].dtype == torch.float32 and torch.equal(found["b"], torch.tensor([3]))
    assert set(dict(read_stored(tmp_path))) == {"a", "b"}


def test_sixteen_parts_are_allowed(tmp_path: Path) -> None:
    tensor = packed((20, 32), *["u2g32"] * 16)
    assert torch.equal(dict(read_tensors(write(tmp_path, {"w": tensor})))["w"], tensor.dequantize())


# ---- hostile folders ----------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weight "w" of two parts, u4g32 and c3g32, and a plain "n"."""
    return write(tmp_path, {"w": packed((40, 64), "u4g32", "c3g32", seed=6), "n": torch.ones(4)})


def refused(folder: Path, told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        list(read_tensors(folder))


def change_entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["tensors"]["w"].update(values)


def change_part(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["tensors"]["w"]["parts"][0].update(values)


def spare_row(body: dict[str, Any]) -> None:
    body["tensors"]["w"]["parts"][0]["rows"] += 1


PART = {"format": "u4g32", "rows": 20}
BAD_PACKING: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer format": (lambda body: body.update(format=2), "format 2; this Gulliver reads 1: upgrade"),
    "bool format": (lambda body: body.update(format=True), "format True"),
    "real format": (lambda body: body.update(format=1.0), "format 1.0"),
    "no format": (lambda body: body.pop("format"), "format and tensors, nothing else"),
    "unknown key": (lambda body: body.update(note="x"), "format and tensors, nothing else"),
    "list of tensors": (lambda body: body.update(tensors=[]), "format and tensors, nothing else"),
    "unknown key of a weight": (change_entry(note="x"), "w must hold shape and parts"),
    "weight is a list": (lambda body: body["tensors"].update(w=[]), "w must hold shape and parts"),
    "negative shape": (change_entry(shape=[40, -64]), r"shape is \[40, -64\]"),
    "bool shape": (change_entry(shape=[40, True]), r"shape is \[40, True\]"),
    "real shape": (change_entry(shape=[40.0, 64]), r"shape is \[40.0, 64\]"),
    "empty shape": (change_entry(shape=[]), r"shape is \[\]"),
    "one dimension": (change_entry(shape=[40]), r"shape is \[40\]"),
    "zero columns": (change_entry(shape=[40, 0]), r"shape is \[40, 0\]"),
    "too many dimensions": (change_entry(shape=[40, 64, *[1] * 99]), "2 to 8 positive sizes"),
    "shape of text": (change_entry(shape="40x64"), "shape is 40x64"),
    "huge shape": (change_entry(shape=[40, 2**60, 2**60]), "w: packed tiles are"),
    "other columns": (change_entry(shape=[40, 65]), "w: packed tiles are"),
    "rows do not sum up": (spare_row, r"parts have \[21, 20\] rows, the weight has 40"),
    "other rows": (change_entry(shape=[41, 64]), "the weight has 41"),
    "negative rows": (
        change_entry(parts=[PART | {"rows": 60}, PART | {"rows": -20}]),
        r"parts have \[60, -20\] rows",
    ),
    "no rows": (change_entry(parts=[PART | {"rows": 40}, PART | {"rows": 0}]), r"parts have \[40, 0\] rows"),
    "bool rows": (change_part(rows=True), "its rows a number"),
    "real rows": (change_part(rows=20.0), "its rows a number"),
    "no parts": (change_entry(parts=[]), "must have 1 to 16 parts"),
    "17 parts": (change_entry(parts=[PART] * 17), "must have 1 to 16 parts"),
    "parts are no list": (change_entry(parts={}), "must have 1 to 16 parts"),
    "part is no object": (change_entry(parts=[3]), "a part must hold format and rows"),
    "part with unknown key": (change_part(note=1), "a part must hold format and rows"),
    "unknown format name": (change_part(format="x4g32"), "'x4g32' is not a format"),
    "format is a number": (change_part(format=4), "format must be text"),
    "other digits": (change_part(format="u²g32"), "is not a format"),
    "digits of another script": (change_part(format="u٤g32"), "is not a format"),
    "a long number": (change_part(format="u4g" + "9" * 5000), "is not a format"),
    "leading zero": (change_part(format="u04g32"), "'u04g32' is not a format"),
    "bits that do not exist": (change_part(format="u7g32"), "bits is 7"),
    "codebook of 8 bits": (change_part(format="c8g32"), "a codebook has 2 to 6 bits"),
    "group size that does not exist": (change_part(format="u4g48"), "group_size is 48"),
    "a weight that is not there": (
        lambda body: body["tensors"].update(v=body["tensors"]["w"]),
        r"lack v.tiles.0, which packing.json promises",
    ),
    "forgotten weight": (
        lambda body: body["tensors"].update(n={"shape": [2, 2], "parts": [PART | {"rows": 2}]}),
        "n is stored both",
    ),
    "one part fewer": (change_entry(parts=[PART | {"rows": 40}]), "w.codebook.1 is stored, but no part"),
    "other kind": (change_part(format="c4g32"), "lack w.codebook.0"),
}


@pytest.mark.parametrize("name", BAD_PACKING)
def test_a_wrong_packing_is_refused(name: str, folder: Path) -> None:
    change, told = BAD_PACKING[name]
    body = json.loads((folder / PACKING).read_text())
    change(body)
    (folder / PACKING).write_text(json.dumps(body))
    refused(folder, told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "format and tensors, nothing else"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"format": 1, "format": 1, "tensors": {}}', "duplicate key 'format'"),
        (b'{"format": 1, "tensors": {"w": NaN}}', "not finite"),
        (b'{"format": 1, "tensors": {"w": {"shape": [40, 1' + b"0" * 30 + b'], "parts": []}}}', "64 bits"),
    ],
)
def test_a_packing_that_is_no_json_is_refused(content: bytes, told: str, folder: Path) -> None:
    (folder / PACKING).write_bytes(content)
    refused(folder, told)


def test_an_oversized_packing_is_not_read(folder: Path) -> None:
    with open(folder / PACKING, "r+b") as stream:
        stream.truncate(MAX_PACKING_BYTES + 1)  # a hole: no bytes on the disk
    refused(folder, "at most 67108864 are allowed")


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def instead(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


def with_factor(value: float) -> Callable[[Tensor], Tensor]:
    """Tiles of u4g32 whose row 5 has this factor: 2 groups of 256 bytes, 2 * 32 of scales and zeros, then factors."""

    def change(tiles: Tensor) -> Tensor:
        at = 2 * 256 + 64 + 2 * 5
        tiles[0, at : at + 2] = torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8)
        return tiles

    return change


def wrong_row(rows: Tensor) -> Tensor:
    return torch.where(torch.arange(len(rows)) == 3, 1 - rows, rows)


BAD_WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no tiles": (without("w.tiles.1"), r"lack w\.tiles\.1"),
    "short tiles": (instead("w.tiles.0", lambda tiles: tiles[:, :-64]), r"w: packed tiles are torch.uint8 \(2, 576\)"),
    "a tile too many": (instead("w.tiles.0", lambda tiles: tiles.repeat(2, 1)), "w: packed tiles are"),
    "flat tiles": (instead("w.tiles.0", lambda tiles: tiles.flatten()), "w: packed tiles are"),
    "signed tiles": (instead("w.tiles.0", lambda tiles: tiles.view(torch.int8)), "w: packed tiles are torch.int8"),
    "no codebook": (without("w.codebook.1"), r"lack w\.codebook\.1"),
    "short codebook": (instead("w.codebook.1", lambda table: table[:7]), r"codebook must be int8 \[8\]"),
    "unsigned codebook": (instead("w.codebook.1", lambda table: table.view(torch.uint8)), "codebook must be int8"),
    "codebook of a uniform part": (
        lambda tensors: tensors.update({"w.codebook.0": torch.zeros(16, dtype=torch.int8)}),
        "w.codebook.0 is stored, but no part",
    ),
    "a spare part": (lambda tensors: tensors.update({"w.tiles.2": tensors["w.tiles.0"].clone()}), "no part"),
    "no rows": (without("w.rows"), r"lack w\.rows"),
    "short rows": (instead("w.rows", lambda rows: rows[:-1]), r"w.rows is torch.uint8 \[39\], not uint8 \[40\]"),
    "wide rows": (instead("w.rows", lambda rows: rows.long()), "w.rows is torch.int64"),
    "row of a part that is not there": (instead("w.rows", lambda rows: rows * 2), r"deals out \[20, 0, 20\] rows"),
    "row of another part": (instead("w.rows", wrong_row), "w.rows deals out"),
    "factor is NaN": (instead("w.tiles.0", with_factor(float("nan"))), "row factor or scale that is not finite"),
    "factor is infinite": (instead("w.tiles.0", with_factor(float("-inf"))), "row factor or scale that is not finite"),
    "both packed and plain": (lambda tensors: tensors.update(w=torch.ones(40, 64)), "w is stored both packed"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_wrong_weights_are_refused(name: str, folder: Path) -> None:
    change, told = BAD_WEIGHTS[name]
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, told)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -700])
def test_truncated_weights_are_refused(kept: int, folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    refused(folder, re.escape(str(folder / WEIGHTS)) + ".*; download or make it again")


def test_a_weight_in_two_files_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    save_file({"n": torch.zeros(4)}, folder / "other.safetensors")
    refused(folder, "duplicate tensor 'n'")


def test_nothing_comes_out_of_a_folder_with_a_stray_tensor(folder: Path) -> None:
    tensors = {**load_file(folder / WEIGHTS), "w": torch.zeros(40, 64)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert "w" in stored_tensors(folder)
    with pytest.raises(ArtifactError, match="both packed and plain"):
        next(read_stored(folder))
