"""GGUF's block types: rows in blocks of 32 or 256 columns, as llama.cpp and what is built on it read them.

A block holds a code for each column, a float16 scale d and, where the type has minima, a float16 e. In blocks of 256,
groups of 16 or 32 columns have a scale code s, and a minimum code m, of 4 to 8 bits; in blocks of 32, s = m = 1:

    value = d · s · level[code] - e · m

`BLOCK_TYPES` says which numbers a type can hold, `encode` puts them into its bytes; reading back is the gguf package's
work. The layouts are those of ggml's `block_q4_0`, …, `block_iq4_xs` (github.com/ggml-org/ggml).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.runtime.formats import BLOCK_TYPES, Format


@dataclass
class BlockRows:
    """Rows of a weight in one block type: its bytes, uint8 [rows, bytes of a row]."""

    format: Format
    blocks: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        kind = BLOCK_TYPES[self.format.kind]
        return self.blocks.shape[0], self.blocks.shape[1] // kind.size_bytes * kind.columns

    def dequantize(self) -> Tensor:
        """The values, float32 [rows, columns]."""
        return torch.from_numpy(dequantized(self.blocks.numpy(), self.format))

    def rows(self, start: int, stop: int) -> BlockRows:
        """The part's rows from `start` to before `stop`."""
        return BlockRows(self.format, self.blocks[start:stop])


def dequantized(blocks: NDArray[np.uint8], fmt: Format) -> NDArray[np.float32]:
    """The values, float32 [rows, columns], of uint8 [rows, bytes of a row]."""
    return gguf.dequantize(np.ascontiguousarray(blocks), gguf.GGMLQuantizationType[fmt.kind])


def opened(blocks: Tensor, fmt: Format, rows: int, columns: int) -> BlockRows:
    """Rows as they are stored, uint8 [rows, bytes of a row]. ArtifactError for another size, and for a scale that is

    not finite.
    """
    row_bytes = fmt.packed_bytes(1, columns) if fmt.holds(columns) else 0
    if tuple(blocks.shape) != (rows, row_bytes) or blocks.dtype != torch.uint8 or not row_bytes:
        raise ArtifactError(
            f"packed blocks are {blocks.dtype} {tuple(blocks.shape)}, but {rows} x {columns} weights as {fmt.name} "
            f"need uint8 {(rows, row_bytes)}; the file is damaged"
        )
    with np.errstate(invalid="ignore"):
        kind = BLOCK_TYPES[fmt.kind]
        table = blocks.numpy().reshape(-1, kind.size_bytes)
        halves = [table[:, at : at + 2].copy().view(np.float16) for at in kind.halves_at]
    if not all(np.isfinite(half).all() for half in halves):
        raise ArtifactError("a packed weight has a scale that is not finite; the file is damaged")
    return BlockRows(fmt, blocks)


# ---- writing ------------------------------------------------------------------------------------------------------
def encode(
    fmt: Format,
    codes: NDArray[np.uint8],
    scales: NDArray[np.int16],
    minima: NDArray[np.int16],
    d: NDArray[np.float16],
    e: NDArray[np.float16],
) -> NDArray[np.uint8]:
    """Bytes uint8 [rows, bytes of a row] of `codes` [rows, columns], `scales` and `minima` [rows, groups], `d` and `e`

    [rows, blocks]; what a type does not have is not looked at.
    """
    kind = BLOCK_TYPES[fmt.kind]
    rows, q = len(codes), codes.reshape(-1, kind.columns)
    count = len(q)
    s, m = (np.asarray(one).reshape(count, -1).astype(np.int16) for one in (scales, minima))
    dd, ee = (np.ascontiguousarray(one, np.float16).reshape(-1, 1).view(np.uint8) for one in (d, e))
    match fmt.kind:
        case "Q4_0" | "IQ4_NL":
            pieces = [dd, _fields(q, 4, 16)]
        case "Q4_1":
            pieces = [dd, _negated(ee), _fields(q, 4, 16)]
        case "Q5_0":
            pieces = [dd, np.packbits(q >> 4, axis=1, bitorder="little"), _fields(q & 15, 4, 16)]
        case "Q5_1":
            pieces = [dd, _negated(ee), np.packbits(q >> 4, axis=1, bitorder="little"), _fields(q & 15, 4, 16)]
        case "Q8_0":
            pieces = [dd, q ^ np.uint8(128)]
        case "Q2_K":
            pieces = [(s | m << 4), _fields(q, 2, 32), dd, ee]
        case "Q3_K":
            s = s + 32
            low = (s[:, :8] & 15) | (s[:, 8:] & 15) << 4
            high = np.bitwise_or.reduce((s >> 4).reshape(count, 4, 4) << np.array([0, 2, 4, 6])[:, None], axis=1)
            pieces = [_fields(q >> 2, 1, 32), _fields(q & 3, 2, 32), low, high, dd]
        case "Q4_K" | "Q5_K":
            first = [one[:, :4] | (one[:, 4:] >> 4) << 6 for one in (s, m)]
            last = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
            high = [_fields(q >> 4, 1, 32)] if fmt.kind == "Q5_K" else []
            pieces = [dd, ee, *first, last, *high, _fields(q & 15, 4, 32)]
        case "Q6_K":
            pieces = [_fields(q & 15, 4, 64), _fields(q >> 4, 2, 32), s & 255, dd]
        case "IQ4_XS":
            s = s + 32
            high = np.bitwise_or.reduce((s >> 4).astype(np.uint16) << (2 * np.arange(8, dtype=np.uint16)), axis=1)
            low = (s[:, ::2] & 15) | (s[:, 1::2] & 15) << 4
            pieces = [dd, high.astype("<u2")[:, None].view(np.uint8), low, _fields(q, 4, 16)]
        case _:
            raise AssertionError(f"no layout for {fmt.kind}")
    return np.concatenate([piece.astype(np.uint8) for piece in pieces], axis=1).reshape(rows, -1)


def _fields(codes: NDArray[Any], width: int, run: int) -> NDArray[np.uint8]:
    """Codes of `width` bits: byte j of `run` bytes holds those of columns j, j + run, … from its low bits on."""
    count = 8 // width
    parts = codes.reshape(len(codes), -1, count, run) << (width * np.arange(count, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(parts, axis=2).reshape(len(codes), -1)


def _negated(halves: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """float16 numbers, as bytes [n, 2], with the other sign."""
    return (-halves.view(np.float16)).view(np.uint8)
