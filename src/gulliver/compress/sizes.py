"""How many bytes the weight files of a packed model take beside the codes themselves."""

from __future__ import annotations

import math
from collections.abc import Set

from safetensors import safe_open

from gulliver.core.store.artifact import Artifact
from gulliver.nets.files import ITEM_BYTES, weight_files
from gulliver.nets.weights import canonical_names
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
    canonical = canonical_names(empty)
    total, seen = FILE_BYTES * SHARDS, set[str]()
    for path in weight_files(model.path):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                name, piece = str(canonical.get(stored, stored)), file.get_slice(stored)
                if name in seen:
                    continue
                seen.add(name)
                if name not in packed:
                    dtype = piece.get_dtype()
                    item_bytes = 2 if dtype == "F32" else ITEM_BYTES.get(dtype, 8)
                    total += math.prod(piece.get_shape()) * item_bytes + len(name) + ENTRY_BYTES
    return total
