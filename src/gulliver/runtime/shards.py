"""Writing weights of any size with little memory: safetensors files of bounded size, and their index.

A file is laid out to be mapped and read from front to back for every token: matrices whose length is a multiple of 64
bytes come first, in the order of use, each at a multiple of 64 bytes of the file, so that a load of 64 bytes touches
one cache line. What is read once, at opening (norms, codebooks, tables of rows), is together behind them. The format
allows no holes: the header is padded with spaces, and other lengths come last, the widest numbers first.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.core.store.files import temporary_name
from gulliver.nets.files import INDEX
from gulliver.nets.weights import CODES
from gulliver.runtime.formats import ALIGNMENT
from gulliver.runtime.packing import order_of_use

SHARD_BYTES = 1_000_000_000
PACKED_SHARD_BYTES = 150_000_000
PLAIN: Mapping[str, str] = {"format": "pt"}  # what a weight file says about itself: transformers asks for it


class ShardWriter:
    """A context manager; `add` tensors, and on leaving without an error the files get their final names.

    One file is `model.safetensors`; several are `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`.
    At most about `shard_bytes` (and one tensor) are in memory. Attribute `names` counts nothing twice: a name added
    again is an AssertionError.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self.names: set[str] = set()

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors of any shape to be written; those of one call are written to one file."""
        twice = self.names & set(tensors)
        assert not twice, f"{min(twice)} was written before"
        size = _size(tensors)
        if self._held and _size(self._held) + size > self._shard_bytes:
            self._flush()
        self._held |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.names |= set(tensors)
        self._total_bytes += size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        if self._held:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        body = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        text = json.dumps(body, indent=2, sort_keys=True)
        (self._folder / INDEX).write_text(text + "\n", encoding="utf-8")

    def _flush(self) -> None:
        write_file(self._part(len(self._shards)), self._held)
        self._shards.append(sorted(self._held))
        self._held = {}

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index}.safetensors"


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any shape to one file, which appears under its name when it is complete."""
    temporary = temporary_name(path)
    write_file(temporary, tensors)
    temporary.rename(path)


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file of tensors of any shape, laid out as this module's head says."""
    names = sorted(tensors, key=lambda name: (_place(tensors[name]), order_of_use(name)))
    rows = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
    with open(path, "wb") as stream:
        write_tensors(stream, rows, ((name, tensors[name]) for name in names), alignment=ALIGNMENT)


def write_tensors(
    stream: BinaryIO,
    rows: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str] = PLAIN,
    alignment: int = 8,
) -> None:
    """Write a safetensors file whose tensors lie in the order of `rows`: name -> (dtype, shape), of any shape.

    They arrive one at a time, in any order, and become the dtype of their row; one is in memory at a time, which
    `safetensors.torch.save_file` does not offer. The first begins at a multiple of `alignment` bytes. TypeError for a
    dtype that the format cannot hold, ArtifactError for a tensor without a row, or of another shape, or a second time.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places, at = {}, 0
    for name, (dtype, shape) in rows.items():
        if dtype not in CODES:
            raise TypeError(f"{name} is {dtype}, which safetensors cannot hold")
        end = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        places[name], at = at, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    stream.write(struct.pack("<Q", len(text)) + text)
    start = stream.tell()
    for name, tensor in tensors:
        place = places.pop(name, None)
        if place is None or tuple(tensor.shape) != tuple(rows[name][1]):
            raise ArtifactError(f"unexpected or duplicate tensor {name} {list(tensor.shape)}")
        stream.seek(start + place)
        stream.write(bytes_of(tensor.detach().to("cpu", rows[name][0])))
    assert not places, f"no data came for {min(places)}"


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any shape in row-major order: a view of its memory where it is dense."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _place(tensor: Tensor) -> tuple[bool, int]:
    """Sorts matrices of whole cache lines to the front, the others so that each begins at a multiple of its numbers."""
    lines = tensor.dim() >= 2 and tensor.nbytes % ALIGNMENT == 0
    return (not lines, 0 if lines else -tensor.element_size())


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
