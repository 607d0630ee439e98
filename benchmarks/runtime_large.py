"""A packed Llama with random codes, written tile by tile: to measure speed alone, with little memory, no quantizer."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from compress_common import write_atomic
from compress_llama import STANDARD_DEVIATION, TOKENIZER_FILES, Shape, _config, _tensors

from gulliver.core.records import PackedPart, PackedWeight, Packing
from gulliver.runtime.formats import TILE_ROWS, Format

CODEBOOK = np.array([-127, -90, -68, -51, -38, -27, -17, -8, 1, 10, 19, 29, 40, 53, 70, 96], np.int8)
"""Sixteen levels of a normal distribution, as `quantize` would learn them for such weights."""
SCALES = (160, 256)
TILES_AT_ONCE = 64


def write_packed_llama(folder: Path, parent: Path, shape: Shape, seed: int = 0) -> None:
    """Write the weights of `shape` in 4 bits with groups of 64, and the parent's tokenizer; nothing if it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    known = json.loads((parent / "config.json").read_text(encoding="utf-8"))
    packing: dict[str, PackedWeight] = {}
    pieces: list[tuple[str, str, tuple[int, ...]]] = []
    for name, size in _tensors(shape, known["vocab_size"]):
        if len(size) == 1:
            pieces.append((name, "F32", size))
            continue
        form = Format(4, 64, "codebook")
        tiles = (-(-size[0] // TILE_ROWS), form.tile_bytes(size[1]))
        pieces += [(f"{name}.tiles.0", "U8", tiles), (f"{name}.codebook.0", "I8", (form.levels,))]
        packing[name] = PackedWeight(shape=size, parts=(PackedPart(format=form.name, rows=size[0]),))
    _write(folder / "model.safetensors", pieces, packing, np.random.default_rng(seed))
    Packing(tensors=packing).write(folder)
    for name in TOKENIZER_FILES:
        if (parent / name).exists():
            shutil.copyfile(parent / name, folder / name)
    write_atomic(folder / "config.json", json.dumps(_config(shape, known), indent=1))


def _write(
    path: Path, pieces: list[tuple[str, str, tuple[int, ...]]], packing: dict[str, PackedWeight], random
) -> None:
    """One safetensors file: length of the header, header, then the bytes of each piece."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, kind, size in pieces:
        count = math.prod(size) * (4 if kind == "F32" else 1)
        header[name] = {"dtype": kind, "shape": list(size), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, kind, size in pieces:
            if kind == "F32":  # norms start at one
                file.write(np.ones(size, "<f4").tobytes())
            elif kind == "I8":
                file.write(CODEBOOK.tobytes())
            else:
                columns = packing[name.removesuffix(".tiles.0")].shape[1]
                file.writelines(chunk.tobytes() for chunk in _tiles(size, columns, random))


def _tiles(size: tuple[int, ...], columns: int, random) -> Iterator[np.ndarray]:
    """Tiles of random codes, uint8 [some, tile_bytes], in the order of docs/artifact.md: codes, scales, row factors."""
    groups = Format(4, 64, "codebook").groups(columns)
    codes, scales = groups * 64 * TILE_ROWS // 2, groups * TILE_ROWS
    spread = float(np.sqrt(np.mean(CODEBOOK.astype(np.float64) ** 2))) * sum(SCALES) / 2
    factor = np.float32(STANDARD_DEVIATION / spread)
    factors = np.full(TILE_ROWS, factor, "<f4").view("<u4") >> 16  # cut to bfloat16
    for start in range(0, size[0], TILES_AT_ONCE):
        tiles = np.zeros((min(TILES_AT_ONCE, size[0] - start), size[1]), np.uint8)
        tiles[:, :codes] = random.integers(0, 256, (len(tiles), codes), np.uint8)
        tiles[:, codes : codes + scales] = random.integers(*SCALES, (len(tiles), scales), np.uint8)
        tiles[:, codes + scales : codes + scales + 2 * TILE_ROWS] = factors.astype("<u2").view(np.uint8)
        yield tiles
