"""Files of a model folder: its weights, where each tensor's bytes are, and what travels with them. Knows no torch."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import foreign
from gulliver.core.store.manifest import EVIDENCE, MANIFEST, read_json
from gulliver.nets.selection import ADAPTER, INDEX, MAX_HEADER_BYTES, adapter, of_adapter, select

ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
"""Code of a type in a header -> bytes of one number. Types of less than a byte are not here."""
MAX_DIMENSIONS = 16
COMPARED_BYTES = 2**20
MAX_TOKENIZER_BYTES = 2**26
"""Twice what the largest vocabulary (262,144 tokens with their merges) takes."""
POOLING = "1_Pooling/config.json"
COMPANIONS = (".json", ".jinja", ".txt", ".model")
"""How the names of configs, tokenizers and chat templates end."""
OF_ONE_FOLDER = (MANIFEST, EVIDENCE, INDEX, ADAPTER)


@dataclass(frozen=True)
class Stored:
    """One tensor in a weight file: its type as the header spells it, shape, and bytes [offset, offset + length)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights; see `nets.selection`. ArtifactError if none."""
    return list(select(folder).files)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Name -> where it is, for every tensor in the weight files of a folder.

    ArtifactError for a header that breaks the format's rules (bytes that are missing, shared by two tensors or unused),
    a name in two files, a tensor that the index promises and its file lacks, and an adapter.
    """
    selection = select(folder)
    found: dict[str, Stored] = {}
    for path in selection.files:
        for name, tensor in _header(path).items():
            if selection.places.get(name, path.name) != path.name:
                continue  # the index says that another file has it
            if name in found:
                told = f"duplicate tensor {name[:200]!r}, in {found[name].path.name} and {path.name} of {folder}"
                raise ArtifactError(f"{told}; keep the file that is meant as model.safetensors")
            found[name] = tensor
    for name, file in selection.places.items():
        if name not in found:
            raise ArtifactError(
                f"{folder / INDEX} says that {file} holds {name[:200]!r}, which it lacks; download both again"
            )
    if of_adapter(found):
        raise ArtifactError(adapter(folder))
    return found


def same_bytes(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are of one type and shape and hold the same bytes; ends at the first difference."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(one.path, "rb") as ours, open(other.path, "rb") as theirs:
        ours.seek(one.offset)
        theirs.seek(other.offset)
        parts = (min(COMPARED_BYTES, one.length - at) for at in range(0, one.length, COMPARED_BYTES))
        return all(ours.read(size) == theirs.read(size) for size in parts)


def not_finite(name: str, path: Path) -> ArtifactError:
    """The error for a stored weight with a value that is not a number, or infinite."""
    return ArtifactError(
        f"{name} in {path} holds values that are not finite (NaN or infinity); download the file again. If it comes "
        "the same, the model was saved after it diverged or overflowed: take another checkpoint or precision of it"
    )


def _header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with foreign(f"{path} cannot be read"), open(path, "rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ArtifactError(f"{path} is not a complete safetensors file; download or make it again")
        body = read_json(stream.read(length).rstrip(b" "), path.name)
    if not isinstance(body, dict):
        raise ArtifactError(f"{path}: the header is not a JSON object; download or make it again")
    metadata = body.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError(f"{path}: the header's __metadata__ is not text by name; download or make it again")
    found = {name: _stored(path, name, row, 8 + length, size) for name, row in body.items()}
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, item[1].length)):
        if tensor.offset != end:
            raise ArtifactError(
                f"{path}: {name[:200]!r} starts at byte {tensor.offset}, the tensor before it ends at {end}: tensors "
                "overlap or leave a gap; download or make it again"
            )
        end += tensor.length
    if end != size:
        raise ArtifactError(f"{path} has {size} bytes, its header describes {end}: it is damaged; download it again")
    return found


def _stored(path: Path, name: str, row: object, start: int, size: int) -> Stored:
    damaged = f"{path}: the header's row of {name[:200]!r} is damaged; download or make it again"
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(damaged)
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= MAX_DIMENSIONS
    known = isinstance(dtype, str) and dtype in ITEM_BYTES
    if not known or not lists or not all(type(n) is int and n >= 0 for n in [*shape, *offsets]):
        raise ArtifactError(damaged)
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype] or start + end > size:
        raise ArtifactError(damaged)
    return Stored(path, dtype, tuple(shape), start + begin, end - begin)


# ---- beside the weights ---------------------------------------------------------------------------------------------
def plain_files(folder: Path) -> dict[str, Path]:
    """Name -> path of the files of a Hugging Face layout folder: its own and the pooling's config."""
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()} if folder.is_dir() else {}
    return found | ({POOLING: folder / POOLING} if (folder / POOLING).is_file() else {})


def check_tokenizer_files(folder: Path) -> None:
    """ArtifactError for a file beside the weights that is larger than any tokenizer's, before a library reads it."""
    for name, path in plain_files(folder).items():
        if name.endswith(COMPANIONS) and name != INDEX and path.stat().st_size > MAX_TOKENIZER_BYTES:
            told = f"{path} has {path.stat().st_size:,} bytes; at most {MAX_TOKENIZER_BYTES:,} are allowed"
            raise ArtifactError(f"{told} for a config or tokenizer")


def copy_companions(files: Mapping[str, Path], folder: Path, left_out: Collection[str] = ()) -> None:
    """Copy into `folder` what travels with a model's weights (config, tokenizer, chat template, …) but for `left_out`.

    `files` are those of the other model by name. Copies, never links: the original may be changed.
    """
    for name, path in files.items():
        travels = name.endswith(COMPANIONS) and ("/" not in name or name == POOLING)
        if travels and name not in left_out and name not in OF_ONE_FOLDER:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
