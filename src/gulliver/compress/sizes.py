"""How many bytes the weight files of a packed model take beside the codes themselves."""

from __future__ import annotations

from collections.abc import Set

from safetensors import safe_open

from gulliver.core.store.artifact import Artifact
from gulliver.nets.files import weight_files
from gulliver.nets.weights import aliases
from gulliver.runtime.formats import Format
from gulliver.tasks import get_task

ENTRY_BYTES = 96
"""Room for one tensor's entry in a safetensors header beside its name: dtype, shape and offsets, written out."""
FILE_BYTES = 128
SHARDS = 16


def packed_overhead_bytes(name: str, fmt: Format) -> int:
    """Header entries of one part of a packed weight: tiles, codebook, and the rows' list, at most."""
    return (len(name) + 16 + ENTRY_BYTES) * (3 if fmt.kind == "codebook" else 2)


def overhead_bytes(model: Artifact, packed: Set[str]) -> int:
    """Bytes of what stays plain (16 bits where it had 32), and of the files' headers; never too few."""
    empty = get_task(model.task).load(model.path, empty=True)
    canonical = {name: first for first, names in aliases(empty).items() for name in names}
    total, seen = FILE_BYTES * SHARDS, set[str]()
    for path in weight_files(model.path):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                name, piece = str(canonical.get(stored, stored)), file.get_slice(stored)
                if name in seen:
                    continue
                seen.add(name)
                count = 1
                for size in piece.get_shape():
                    count *= size
                if name not in packed:
                    total += count * _bytes_each(piece.get_dtype()) + len(name) + ENTRY_BYTES
    return total


def _bytes_each(dtype: str) -> int:
    widths = {"BF16": 2, "F16": 2, "F32": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}
    return widths.get(dtype, 8)
