"""GGUF blocks that our tiles hold to the last bit: they stay packed, at the bytes that they had.

    Q4_0, Q5_0, Q8_0   value = d · (q - 2^(b - 1))     h4g32, h5g32, h8g32
    Q4_1, Q5_1         value = d · q + m               m4g32, m5g32
    Q1_0, Q2_0, TQ1_0, TQ2_0   value = d · l           h2g64, h2g128: the code of the level l is l + 2

A level of 2, which Q2_0 could hold and ternary models do not use, has no code: such a tensor is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gulliver.runtime.formats import TILE_ROWS, Format
from gulliver.runtime.packed import RowGroup, pack
from gulliver.tasks.language.gguf.decode import Bytes, decoder_of, in_shares, q1_0_levels, q2_0_levels
from gulliver.tasks.language.gguf.header import TensorType

SHARE = 2**20
"""Numbers that are packed at a time, about."""
TERNARY = {"Q1_0": 128, "Q2_0": 64, "TQ1_0": 128, "TQ2_0": 128}
"""Type -> columns of a group, where a block has not fewer."""
FORMATS: Mapping[str, Format] = {
    **{f"Q{bits}_0": Format(bits, 32, "half") for bits in (4, 5, 8)},
    **{f"Q{bits}_1": Format(bits, 32, "minimum") for bits in (4, 5)},
}


def format_of(kind: TensorType) -> Format | None:
    """The format that keeps blocks of a type; None when there is none."""
    if kind.name in TERNARY:
        return Format(2, max(TERNARY[kind.name], min(kind.block, 128)), "half")
    return FORMATS.get(kind.name)


def holds(kind: TensorType, blocks: Bytes) -> bool:
    """Whether every level in blocks uint8 [n, bytes of one] has a code."""
    if kind.name != "Q2_0":
        return format_of(kind) is not None
    step = SHARE // kind.block
    starts = range(0, len(blocks), step)
    return all(in_shares(lambda start: int(q2_0_levels(blocks[start : start + step]).max()) < 2, starts))


def keep(kind: TensorType, rows: Bytes, columns: int) -> Tensor:
    """The tiles uint8 [tiles, bytes of one] of a weight whose rows are blocks of a type, uint8 [rows, bytes].

    ValueError when a scale is not finite. `holds` says whether a type's blocks can be kept.
    """
    fmt = format_of(kind)
    assert fmt is not None, f"{kind.name} has no format"
    count = -(-len(rows) // TILE_ROWS)
    tiles = torch.empty(count, fmt.tile_bytes(columns), dtype=torch.uint8)
    step = max(1, SHARE // columns // TILE_ROWS)

    def share(start: int) -> bool:
        some = rows[start * TILE_ROWS : (start + step) * TILE_ROWS]
        codes, scales, least = blocks_of(kind, np.ascontiguousarray(some).reshape(-1, kind.size_bytes))
        sides = [side for side in (scales, least) if side is not None]
        if not all(np.isfinite(side).all() for side in sides):
            raise ValueError("a scale is not finite")
        grouped = [torch.from_numpy(_per_group(side, kind, fmt).reshape(len(some), -1)) for side in sides]
        tiles[start : start + step] = pack(
            RowGroup(
                fmt,
                torch.from_numpy(codes.reshape(len(some), columns)),
                grouped[0],
                torch.ones(len(some), dtype=torch.bfloat16),
                minimums=grouped[1] if least is not None else None,
            )
        )
        return True

    in_shares(share, range(0, count, step))
    return tiles


def _per_group(side: np.ndarray, kind: TensorType, fmt: Format) -> np.ndarray:
    """Numbers of blocks [n, 1] as those of groups, of which a block may have several: float16."""
    return np.repeat(side, max(1, kind.block // fmt.group_size), axis=1)


def blocks_of(kind: TensorType, blocks: Bytes) -> tuple[Bytes, np.ndarray, np.ndarray | None]:
    """Codes uint8 [n, numbers of a block] , scales and minimums float16 [n, 1], of n blocks."""
    name = kind.name
    if name in TERNARY:
        return _ternary(name, blocks)
    halves = np.ascontiguousarray(blocks[:, :4]).view(np.float16)
    scales, least = halves[:, :1], halves[:, 1:] if name.endswith("_1") else None
    body = blocks[:, 2 if least is None else 4 :]
    if name == "Q8_0":
        return body ^ np.uint8(128), scales, None
    high = None
    if name.startswith("Q5"):
        high, body = body[:, :4], body[:, 4:]
    codes = np.concatenate([body & 15, body >> 4], axis=1)
    if high is not None:
        codes |= np.unpackbits(high, axis=1, bitorder="little") << 4
    return codes.astype(np.uint8, copy=False), scales, least


def _ternary(name: str, blocks: Bytes) -> tuple[Bytes, np.ndarray, None]:
    if name in ("Q1_0", "Q2_0"):
        scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16)
        levels = (q1_0_levels if name == "Q1_0" else q2_0_levels)(blocks)
    else:  # the scale is at the end; with a scale of one, values are levels
        scales = np.ascontiguousarray(blocks[:, -2:]).view(np.float16)
        unit = blocks.copy()
        unit[:, -2:] = np.array([1.0], np.float16).view(np.uint8)
        levels = np.rint(decoder_of(name)(unit)).astype(np.int8)
    return (levels + 2).view(np.uint8), scales, None
