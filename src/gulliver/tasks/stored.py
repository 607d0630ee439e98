"""The tensors of a model's folder, plain or packed, for the families' `load`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gulliver.nets.weights import read_safetensors

PACKING = "packing.json"


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) one at a time; packed ones are unpacked. ArtifactError for a damaged file."""
    if not (folder / PACKING).is_file():
        yield from read_safetensors(folder, torch.float32)
        return
    from gulliver.runtime.reference import read_tensors

    yield from read_tensors(folder, dtype=torch.float32)
