"""A plain model's matrices in 8 bits, fast: what lets it write text natively while its own weights stay as they are.

Every group of weights is rounded to the nearest of 256 evenly spaced values between its least and its largest. There
is no calibration and no search; a model that is shipped is packed by the step `quantize`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gulliver.core.records import PackedWeight, Packing
from gulliver.nets.files import copy_companions
from gulliver.nets.weights import read_safetensors
from gulliver.runtime.formats import Format
from gulliver.runtime.grid import SCALE_LEVELS, as_groups, row_factors
from gulliver.runtime.packed import PackedTensor, RowGroup, joined
from gulliver.runtime.reference import packing_entry, stored_form
from gulliver.runtime.shards import PACKED_SHARD_BYTES, ShardWriter

EIGHT_BITS = Format(8, 64, "uniform")
CHUNK_ROWS = 4096
"""Rows of which float32 copies are in memory."""


def write_in_eight_bits(source: Path, target: Path) -> None:
    """A copy of the plain model folder `source` in the empty folder `target`, its matrices in 8 bits."""
    packing: dict[str, PackedWeight] = {}
    with ShardWriter(target, PACKED_SHARD_BYTES) as shards:
        for name, tensor in read_safetensors(source):
            if tensor.dim() != 2 or not tensor.is_floating_point():
                shards.add({name: tensor})
                continue
            part = joined([in_eight_bits(rows.float()) for rows in tensor.split(CHUNK_ROWS)])
            packed = PackedTensor(tuple(tensor.shape), [part])
            packing[name] = packing_entry(packed)
            shards.add(stored_form(name, packed))
    Packing(tensors=packing).write(target)
    copy_companions({path.name: path for path in source.iterdir() if path.is_file()}, target)


def in_eight_bits(weight: Tensor) -> RowGroup:
    """float32 [rows, columns] as 256 evenly spaced values for each group of a row."""
    rows, columns = weight.shape
    groups = as_groups(weight, EIGHT_BITS)
    low, high = groups.amin(2).clamp_(max=0.0), groups.amax(2).clamp_(min=0.0)
    wanted = (high - low) / (EIGHT_BITS.levels - 1)
    factors = row_factors(wanted)
    scales = torch.ceil(wanted / factors.float()[:, None]).clamp_(1, SCALE_LEVELS)
    steps = scales * factors.float()[:, None]
    zeros = torch.round(-low / steps)
    codes = (groups / steps[:, :, None]).add_(zeros[:, :, None]).round_().clamp_(0, EIGHT_BITS.levels - 1)
    codes = codes.to(torch.uint8).view(rows, -1)[:, :columns].contiguous()
    return RowGroup(EIGHT_BITS, codes, scales.to(torch.uint8), factors, zeros.to(torch.uint8))
