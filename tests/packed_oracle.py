"""The slow, obvious reading of packed tiles: what the library's unpacking and the native kernels are compared with."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from gulliver.runtime.formats import PLANES, TILE_ROWS, Format


def unpack_slowly(tiles: Tensor, fmt: Format, rows: int, columns: int, codebook: Tensor | None) -> list[list[float]]:
    """The values [rows][columns], one weight at a time, straight from the rules of docs/artifact.md."""
    groups, values = fmt.groups(columns), []
    group_bytes = fmt.group_size * TILE_ROWS * fmt.bits // 8
    scales_at = groups * group_bytes
    zeros_at = scales_at + groups * TILE_ROWS
    beside = {"codebook": 1, "uniform": 2, "half": 2, "minimum": 4}[fmt.kind]
    factors_at = scales_at + groups * TILE_ROWS * beside
    for row in range(rows):
        tile, lane = tiles[row // TILE_ROWS].tolist(), row % TILE_ROWS
        factor_bytes = bytes(tile[factors_at + 2 * lane : factors_at + 2 * lane + 2])
        factor = torch.frombuffer(bytearray(factor_bytes), dtype=torch.bfloat16).item()
        line = []
        for column in range(columns):
            group, inside = divmod(column, fmt.group_size)
            code, shift, start = 0, 0, group * group_bytes
            for width in PLANES[fmt.bits]:
                chunk, position = divmod(inside, 4 * (8 // width))
                field, lane_column = divmod(position, 4)
                byte = tile[start + 64 * chunk + 4 * lane + lane_column]
                code |= ((byte >> (width * field)) & ((1 << width) - 1)) << shift
                start, shift = start + fmt.group_size * TILE_ROWS * width // 8, shift + width
            if fmt.kind in ("half", "minimum"):
                side = scales_at + 2 * (group * TILE_ROWS + lane)
                (scale,) = struct.unpack("<e", bytes(tile[side : side + 2]))
                side += 2 * groups * TILE_ROWS
                least = struct.unpack("<e", bytes(tile[side : side + 2]))[0] if fmt.kind == "minimum" else 0.0
                level = code - (1 << fmt.bits >> 1) if fmt.kind == "half" else code
                line.append(float(np.float32(np.float32(factor * scale * level) + np.float32(factor * least))))
                continue
            scale = tile[scales_at + group * TILE_ROWS + lane]
            level = int(codebook[code]) if codebook is not None else code - tile[zeros_at + group * TILE_ROWS + lane]
            line.append(factor * scale * level)
        values.append(line)
    return values
