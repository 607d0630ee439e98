"""The header of a GGUF file (ggml's docs/gguf.md, versions 2 and 3), read with the standard library alone.

Nothing of the weights is read. Every length is checked against the file before it is believed, so that a refusal takes
milliseconds whatever a file claims. A model may be dealt out to files NAME-00001-of-0000N.gguf; any of them names all.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.foreign import check_file, check_folder
from gulliver.nets.selection import MMPROJ

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 65535
MAX_VALUES = 2**22
"""Of an array in the metadata: ten times the largest vocabulary. Each takes some fifty bytes of memory."""
DEFAULT_ALIGNMENT = 32
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)?", re.IGNORECASE | re.DOTALL)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class TensorType:
    """A way to store numbers: `block` numbers take `size_bytes` bytes; `readable` here or known by name only."""

    name: str
    block: int
    size_bytes: int
    readable: bool = True


TYPES: Mapping[int, TensorType] = {
    **{
        0: TensorType("F32", 1, 4),
        1: TensorType("F16", 1, 2),
        30: TensorType("BF16", 1, 2),
        28: TensorType("F64", 1, 8),
    },
    **{
        24: TensorType("I8", 1, 1),
        25: TensorType("I16", 1, 2),
        26: TensorType("I32", 1, 4),
        27: TensorType("I64", 1, 8),
    },
    **{2: TensorType("Q4_0", 32, 18), 3: TensorType("Q4_1", 32, 20), 6: TensorType("Q5_0", 32, 22)},
    **{7: TensorType("Q5_1", 32, 24), 8: TensorType("Q8_0", 32, 34), 9: TensorType("Q8_1", 32, 36, readable=False)},
    **{10: TensorType("Q2_K", 256, 84), 11: TensorType("Q3_K", 256, 110), 12: TensorType("Q4_K", 256, 144)},
    **{13: TensorType("Q5_K", 256, 176), 14: TensorType("Q6_K", 256, 210)},
    **{15: TensorType("Q8_K", 256, 292, readable=False)},
    **{16: TensorType("IQ2_XXS", 256, 66), 17: TensorType("IQ2_XS", 256, 74), 22: TensorType("IQ2_S", 256, 82)},
    **{18: TensorType("IQ3_XXS", 256, 98), 21: TensorType("IQ3_S", 256, 110), 19: TensorType("IQ1_S", 256, 50)},
    **{29: TensorType("IQ1_M", 256, 56), 20: TensorType("IQ4_NL", 32, 18), 23: TensorType("IQ4_XS", 256, 136)},
    **{34: TensorType("TQ1_0", 256, 54), 35: TensorType("TQ2_0", 256, 66)},
    **{39: TensorType("MXFP4", 32, 17), 40: TensorType("NVFP4", 64, 36)},
    **{41: TensorType("Q1_0", 128, 18), 42: TensorType("Q2_0", 64, 18)},
}
"""Number in a file -> type."""
GONE = {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
"""Types that llama.cpp no longer reads either: rows woven for one kind of processor."""
IK_LLAMA = {
    **{133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K"},
    **{141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT"},
    **{155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT"},
}
"""Types that only ik_llama.cpp writes and reads."""
WIDE_Q2_0 = TensorType("Q2_0", 128, 34)
"""The block of 128 that PrismML's llama.cpp writes under the same number; the distances of tensors tell them apart."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` as transformers counts it (rows first), bytes [offset, offset + length) of `path`."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Texts:
    """An array of `count` texts, which a vocabulary's is: bytes [start, stop) of a file, decoded when asked for."""

    path: Path
    key: str
    start: int
    stop: int
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self) -> list[str]:
        """The texts. ArtifactError for one that is not UTF-8."""
        with open(self.path, "rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.stop - self.start)
        unpack, at, found = struct.Struct("<Q").unpack_from, 0, []
        try:
            for _ in range(self.count):
                end = at + 8 + unpack(data, at)[0]
                found.append(data[at + 8 : end].decode())
                at = end
        except (struct.error, UnicodeDecodeError):
            raise ArtifactError(f"{self.path}: {self.key} holds a text that is not UTF-8; download it again") from None
        return found


@dataclass(frozen=True)
class Header:
    """What a model's file (or files) says: metadata by key, tensors in the order of the file."""

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


# ---- which files ----------------------------------------------------------------------------------------------------
def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does, whatever it is called."""
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def model_file(path: Path) -> Path | None:
    """The GGUF that a user means by `path`: the file itself, or the only model in a folder that holds nothing else.

    None when there is none. ConfigError when a folder holds several models.
    """
    if path.is_file():
        return path if is_gguf(path) or path.suffix.lower() == ".gguf" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    check_folder(path)
    files = [file for file in sorted(path.iterdir()) if file.is_file() and is_gguf(file)]
    files = [file for file in files if not file.name.lower().startswith(MMPROJ)]
    models = [file for file in files if not (found := _PART.fullmatch(file.name)) or int(found[2]) == 1]
    if len(models) > 1:
        raise ConfigError(
            f"{path} holds {len(models)} GGUF models ({', '.join(f.name for f in models)}); name one of them"
        )
    return (models or files or [None])[0]


def parts_of(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` is a part of, in order. ArtifactError naming the first that is missing."""
    found = _PART.fullmatch(path.name)
    if not found:
        return (path,)
    count = int(found[3])
    if not 1 <= int(found[2]) <= count:
        raise ArtifactError(f"{path.name} says that it is part {int(found[2])} of {count}; it was renamed wrongly")
    names = [f"{found[1]}-{number:05d}-of-{found[3]}{found[4] or ''}" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        told = f"{missing[0]} is missing beside {path.name}" + (
            f" ({len(missing)} parts in all)" if missing[1:] else ""
        )
        raise ArtifactError(f"{told}; a split GGUF needs all of its {count} parts in one folder")
    for name in names:
        if name != path.name:
            check_file(path.parent / name, path.parent)
    return tuple(path.parent / name for name in names)


def read_header(path: Path) -> Header:
    """The header of the model in `path` and the parts beside it. ArtifactError for a file that breaks the format."""
    files = parts_of(path)
    heads = [_read_one(file) for file in files]
    metadata, tensors = dict(heads[0].metadata), dict(heads[0].tensors)
    count = metadata.get("split.count", 1)
    if count not in (0, len(files)):
        told = f"{path.name} is part of a GGUF split into {count} files, of which {len(files)} were found by its name"
        raise ArtifactError(f"{told}; keep the names -00001-of-{str(count)[:5]:0>5}.gguf … that it was downloaded with")
    for number, head in enumerate(heads[1:], 1):
        if head.metadata.get("split.no", number) != number:
            raise ArtifactError(
                f"{head.path.name} says that it is part {head.metadata['split.no'] + 1}; it was renamed"
            )
        for name, tensor in head.tensors.items():
            if name in tensors:
                raise ArtifactError(f"{head.path.name} holds {name[:200]!r}, which another part holds, too")
            tensors[name] = tensor
    wanted = metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise ArtifactError(
            f"{path.name}: its parts hold {len(tensors)} tensors, {wanted} were split; download it again"
        )
    return Header(path, files, metadata, tensors)


# ---- one file -------------------------------------------------------------------------------------------------------
class _Reader:
    """A place in the bytes of a file; reading beyond the end is an error that says so."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def broken(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path} is not a readable GGUF file: {what}; download it again")

    def take(self, code: str) -> Any:
        size = struct.calcsize(code)
        if self.at + size > self.size:
            raise self.broken(f"it ends at byte {self.size}, inside its header")
        self.at += size
        return struct.unpack_from(f"<{code}", self.data, self.at - size)[0]

    def text(self, what: str, longest: int | None = None) -> str:
        length = self.take("Q")
        if length > (self.size - self.at if longest is None else min(longest, self.size - self.at)):
            raise self.broken(f"{what} of {length} bytes does not fit")
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode()
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(f"the text of {key}")
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.broken(f"{key} has a value of type {kind}, which the format does not know")
        found = self.take(_SCALARS[kind])
        return bool(found) if kind == _BOOL else found

    def array(self, key: str) -> Sequence[Any] | Texts:
        kind, count = self.take("I"), self.take("Q")
        least = 8 if kind == _STRING else struct.calcsize(_SCALARS.get(kind, "x"))
        if kind == _ARRAY or (kind != _STRING and kind not in _SCALARS):
            raise self.broken(f"{key} is an array of type {kind}, which cannot be in one")
        if count > MAX_VALUES:
            raise self.broken(f"{key} is an array of {count} values; no model has more than {MAX_VALUES}")
        if count * least > self.size - self.at:
            raise self.broken(f"{key} is an array of {count} values, more than the file has bytes for")
        if kind == _STRING:
            return self.texts(key, count)
        at, self.at = self.at, self.at + count * least
        found = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, at)
        return [bool(one) for one in found] if kind == _BOOL else list(found)

    def texts(self, key: str, count: int) -> Texts:
        unpack, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except struct.error:
            at = self.size + 1
        if at > self.size:
            raise self.broken(f"a text in {key} does not fit")
        found, self.at = Texts(self.path, key, self.at, at, count), at
        return found


def _read_one(path: Path) -> Header:
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data, path)
            count, metadata = _read_metadata(reader)
            return Header(path, (path,), metadata, _read_tensors(reader, count, metadata))
    except (OSError, ValueError) as error:  # mmap refuses an empty file
        raise ArtifactError(f"{path} is not a readable GGUF file: {error}; download it again") from None


def _read_metadata(reader: _Reader) -> tuple[int, dict[str, Any]]:
    """(number of tensors, metadata). ArtifactError for another format, version or byte order."""
    if reader.data[:4] != MAGIC:
        raise reader.broken("it does not begin with the letters GGUF")
    reader.at = 4
    version = reader.take("I")
    if version not in VERSIONS:
        if version and version & 0xFFFF == 0:
            raise ArtifactError(f"{reader.path} is a big-endian GGUF; convert the original for little-endian machines")
        told = f"{reader.path} is a GGUF of version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read"
        raise ArtifactError(f"{told}: convert the model again")
    tensors, keys = reader.take("Q"), reader.take("Q")
    if keys * 13 + tensors * 24 > reader.size:
        raise reader.broken(f"it claims {keys} keys and {tensors} tensors, more than the file has bytes for")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text("a key", MAX_NAME_BYTES)
        if key in metadata:
            raise reader.broken(f"the key {key[:200]!r} is there twice")
        metadata[key] = reader.value(reader.take("I"), key[:200])
    return tensors, metadata


def _read_tensors(reader: _Reader, count: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Name -> tensor, every one inside the file, none over another."""
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise reader.broken(f"general.alignment is {str(alignment)[:40]}, which is no power of two")
    found: dict[str, TensorInfo] = {}
    for _ in range(count):
        tensor = _read_tensor(reader)
        if tensor.name in found:
            raise reader.broken(f"the tensor {tensor.name[:200]!r} is there twice")
        found[tensor.name] = tensor
    start = -(-reader.at // alignment) * alignment
    found = _widened({name: replace(one, offset=start + one.offset) for name, one in found.items()}, alignment)
    end = start
    for tensor in sorted(found.values(), key=lambda one: one.offset):
        if tensor.offset % alignment or tensor.offset < end:
            raise reader.broken(
                f"{tensor.name[:200]!r} begins at byte {tensor.offset}, inside another tensor or unaligned"
            )
        end = tensor.offset + tensor.length
        if end > reader.size:
            told = f"{tensor.name[:200]!r} ends at byte {end}, the file at {reader.size}"
            raise reader.broken(f"it is truncated: {told}")
    return found


def _read_tensor(reader: _Reader) -> TensorInfo:
    name = reader.text("a tensor's name", MAX_NAME_BYTES)
    dimensions = reader.take("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise reader.broken(f"{name[:200]!r} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
    shape = tuple(reversed([reader.take("Q") for _ in range(dimensions)]))
    number, offset = reader.take("I"), reader.take("Q")
    kind = TYPES.get(number)
    if kind is None or not kind.readable:
        told = f"{reader.path}: {name[:200]!r} is stored as {_called(number)}, which is not read"
        raise ArtifactError(f"{told}; take another quantization of this model")
    if min(shape) < 1 or math.prod(shape) > 8 * kind.block * reader.size or shape[-1] % kind.block:
        raise reader.broken(f"{name[:200]!r} has shape {list(shape)}, which {kind.name} cannot hold in this file")
    return TensorInfo(name, kind, shape, reader.path, offset, math.prod(shape) // kind.block * kind.size_bytes)


def _called(number: int) -> str:
    """What to call a type that is not read."""
    if number in TYPES or number in GONE:
        return f"the type {TYPES[number].name if number in TYPES else GONE[number]}"
    if number in IK_LLAMA:
        return f"the type {IK_LLAMA[number]} of ik_llama.cpp"
    return f"type number {number}, a type of another fork of llama.cpp"


def _widened(tensors: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """The tensors with those of Q2_0 in the block size that fits the distances between them."""
    narrow = TYPES[42]
    order = sorted(tensors.values(), key=lambda one: one.offset)
    for one, after in pairwise(order):
        if one.type is not narrow or one.shape[-1] % WIDE_Q2_0.block:
            continue
        wide = math.prod(one.shape) // WIDE_Q2_0.block * WIDE_Q2_0.size_bytes
        if -(-wide // alignment) * alignment == after.offset - one.offset:
            sizes = {
                other.name: math.prod(other.shape) // WIDE_Q2_0.block * WIDE_Q2_0.size_bytes
                for other in order
                if other.type is narrow
            }
            return {
                name: replace(other, type=WIDE_Q2_0, length=sizes[name]) if name in sizes else other
                for name, other in tensors.items()
            }
        break
    return tensors
