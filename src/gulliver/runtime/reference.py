"""Packed model folders: how tensors are stored in the files, and the slow, obvious way to read them back.

`packing.json` lists every packed weight: shape, parts and dimension of the inputs. For NAME the files hold NAME.tiles.K
(uint8 [tiles, tile_bytes]) and, where the format has one, NAME.codebook.K (int8) for part K, and NAME.rows (uint8
[rows]) when there is more than one part. All other tensors have their own names. docs/artifact.md has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.core.records import PackedPart, PackedWeight
from gulliver.core.store.manifest import PACKING
from gulliver.nets.files import stored_tensors
from gulliver.nets.weights import read_safetensors, read_tensor
from gulliver.runtime.blocks import BlockRows
from gulliver.runtime.packed import PackedTensor, RowGroup, pack, unpack
from gulliver.runtime.packing import PIECE, Entry, is_packed, order_of_use, read_packing, stored_names


# ---- writing ------------------------------------------------------------------------------------------------------
def stored_form(name: str, tensor: PackedTensor) -> dict[str, Tensor]:
    """What the weight files hold for one packed weight [rows, …], by name; this module's head lists them."""
    stored: dict[str, Tensor] = {}
    for index, part in enumerate(tensor.parts):
        stored[f"{name}.tiles.{index}"] = pack(part)
        if isinstance(part, RowGroup) and part.codebook is not None:
            stored[f"{name}.codebook.{index}"] = part.codebook
    if tensor.row_part is not None:
        stored[f"{name}.rows"] = tensor.row_part
    return stored


def packing_entry(tensor: PackedTensor) -> PackedWeight:
    """The row of `packing.json` for one packed weight of any shape."""
    parts = tuple(PackedPart(format=part.format.name, rows=part.shape[0]) for part in tensor.parts)
    return PackedWeight(shape=tuple(tensor.shape), parts=parts, inputs=tensor.inputs)


# ---- reading ------------------------------------------------------------------------------------------------------
def read_tensors(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor of any shape), one at a time, of a plain or packed folder; unpacked, floating ones as `dtype`.

    ArtifactError for a damaged file.
    """
    tensors = read_stored(folder) if is_packed(folder) else read_safetensors(folder, dtype)
    return ((name, _plain(tensor, dtype)) for name, tensor in tensors)


def _plain(tensor: PackedTensor | Tensor, dtype: torch.dtype) -> Tensor:
    found = tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor
    return found.to(dtype) if found.is_floating_point() else found


def read_stored(
    folder: Path, only: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, PackedTensor | Tensor]]:
    """(name, packed weight or plain tensor, of any shape), one at a time: packed ones first, both in the order of use.

    Those whose name `only` refuses are not read. ArtifactError for a damaged file.
    """
    packing = read_packing(folder) if is_packed(folder) else {}
    stored = stored_tensors(folder)
    plain = _plain_names(folder, packing, stored)
    for name in filter(only, sorted(packing, key=order_of_use)):
        entry = packing[name]
        parts: list[RowGroup | BlockRows] = []
        for piece in stored_names(name, entry.parts):
            if piece not in stored:
                raise ArtifactError(f"the weight files lack {piece}, which {PACKING} promises; the model is damaged")
        for index, (fmt, rows) in enumerate(entry.parts):
            codebook = read_tensor(stored, f"{name}.codebook.{index}") if fmt.kind == "codebook" else None
            try:
                tiles = read_tensor(stored, f"{name}.tiles.{index}")
                parts.append(unpack(tiles, fmt, rows, entry.columns, codebook))
            except ArtifactError as error:
                raise ArtifactError(f"{name}: {error}") from error
        row_part = read_tensor(stored, f"{name}.rows") if len(parts) > 1 else None
        if row_part is not None:
            _check_rows(name, row_part, [rows for _, rows in entry.parts])
        yield name, PackedTensor(entry.shape, parts, row_part, entry.inputs)
    for name in filter(only, plain):
        yield name, read_tensor(stored, name)


def _plain_names(folder: Path, packing: Mapping[str, Entry], stored: Iterable[str]) -> list[str]:
    """The stored tensors that are no piece of a packed weight, in the order of use. ArtifactError for a stray piece."""
    owned = {piece for name, entry in packing.items() for piece in stored_names(name, entry.parts)}
    plain = sorted(set(stored) - owned, key=order_of_use)
    for name in plain:
        if name in packing:
            raise ArtifactError(f"{folder}: {name} is stored both packed and plain; the files do not belong together")
        if PIECE.sub("", name) in packing:
            raise ArtifactError(f"{folder}: {name} is stored, but no part in {PACKING} needs it; the model is damaged")
    return plain


def _check_rows(name: str, row_part: Tensor, wanted: list[int]) -> None:
    """ArtifactError unless `row_part` [rows] deals out as many rows to each part as are `wanted`."""
    if row_part.dtype != torch.uint8 or tuple(row_part.shape) != (sum(wanted),):
        raise ArtifactError(f"{name}.rows is {row_part.dtype} {list(row_part.shape)}, not uint8 [{sum(wanted)}]")
    counts = torch.bincount(row_part.long(), minlength=len(wanted)).tolist()
    if counts != wanted:
        raise ArtifactError(f"{name}.rows deals out {counts} rows, {PACKING} says {wanted}")
