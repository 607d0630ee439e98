"""The canonical layout of packed weights: tiles of 16 output rows, codes interleaved for 64-byte loads.

A weight matrix [rows, columns] is cut into one or more *parts* (sets of rows), each with one `Format`. A part stores
for every weight a code of 2…8 bits, for every group of `group_size` columns a scale of 8 bits (and a zero point, when
uniform), and for every row one bfloat16 factor. With q the code, s the scale, f the row factor:

    uniform    value = f · s · (q - zero)
    codebook   value = f · s · codebook[q]          (codebook: 2^bits signed bytes, one table for the part)

Two kinds keep other tools' blocks (GGUF's Q4_0, Q4_1, …) to the last bit. Scale d and minimum m are float16:

    half       value = f · d · (q - 2^(bits - 1))
    minimum    value = f · (d · q + m)

Products inside a group stay integer until the scale, and until the row factor after it. The bytes of a tile are, in
order: the codes of each group, all scales [groups, 16], all zero points [groups, 16] (uniform only), 16 row factors,
and padding to a multiple of 64. Codes are split into planes of 4, 2 and 1 bits (`PLANES`). In a plane of w bits, byte
4·r + c of a 64-byte chunk belongs to row r of the tile, and its field j (bits w·j to w·j + w - 1) to column
4·j + c of the chunk: the 16 lanes of a 512-bit register are 16 rows, each holding four consecutive columns, which is
what an 8-bit dot-product instruction takes. docs/artifact.md states the format as rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.runtime.blocks import BlockRows, opened
from gulliver.runtime.formats import PLANES, TILE_ROWS, Format

CHUNK_ROWS = 8192


@dataclass
class RowGroup:
    """Rows of a weight in one format: codes uint8 [rows, columns], scales uint8 [rows, groups], factors bf16 [rows],

    zeros uint8 [rows, groups] (uniform) or codebook int8 [2^bits] (codebook). The kinds half and minimum have float16
    scales, the latter minimums float16 [rows, groups], too.
    """

    format: Format
    codes: Tensor
    scales: Tensor
    factors: Tensor
    zeros: Tensor | None = None
    codebook: Tensor | None = None
    minimums: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @cached_property
    def group_of_column(self) -> Tensor:
        """int64 [columns]."""
        return torch.arange(self.codes.shape[1]) // self.format.group_size

    def dequantize(self) -> Tensor:
        """The values, float32 [rows, columns]."""
        rows, columns = self.shape
        size = self.format.group_size
        factors = self.factors.float()[:, None]
        scale = factors * self.scales.float()
        values = self.codes.float() if self.codebook is None else self.codebook.float()[self.codes.int()]
        if columns % size:
            values = torch.nn.functional.pad(values, (0, size - columns % size))
        values = values.view(rows, -1, size)
        if self.zeros is not None:
            values = values - self.zeros.float()[:, :, None]
        elif self.format.kind == "half":
            values = values - self.format.levels / 2
        if self.minimums is not None:
            scaled = values * scale[:, :, None] + (factors * self.minimums.float())[:, :, None]
            return scaled.view(rows, -1)[:, :columns]
        return (values * scale[:, :, None]).view(rows, -1)[:, :columns]

    def rows(self, start: int, stop: int) -> RowGroup:
        """The part's rows from `start` to before `stop`."""
        zeros, least = (None if side is None else side[start:stop] for side in (self.zeros, self.minimums))
        chosen = self.codes[start:stop], self.scales[start:stop], self.factors[start:stop]
        return RowGroup(self.format, *chosen, zeros, self.codebook, least)


def joined(parts: list[RowGroup]) -> RowGroup:
    """Parts of one format and one codebook as one, rows in order."""
    if len(parts) == 1:
        return parts[0]
    first, names = parts[0], ("codes", "scales", "factors", "zeros", "minimums")
    columns = {name: [getattr(part, name) for part in parts] for name in names if getattr(first, name) is not None}
    return replace(first, **{name: torch.cat(tensors) for name, tensors in columns.items()})


@dataclass
class PackedTensor:
    """A weight of `shape` as parts of the matrix that `as_matrix` makes of it.

    `row_part` uint8 [rows] names the part of each row when there is more than one; rows keep their order in a part.
    """

    shape: tuple[int, ...]
    parts: Sequence[RowGroup | BlockRows]
    row_part: Tensor | None = None
    inputs: int | None = None

    @property
    def in_tiles(self) -> list[RowGroup]:
        """The parts of a weight that is stored in tiles. ConfigError for one in blocks of GGUF."""
        for part in self.parts:
            if isinstance(part, BlockRows):
                raise ConfigError(
                    f"this model was fitted for gguf: it is stored as {part.format.name}, which only GGUF and plain "
                    "safetensors can hold; export it as one of them, or fit again without --for gguf"
                )
        return [part for part in self.parts if isinstance(part, RowGroup)]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as `dtype`, [rows, …] or another `shape`; float32 copies of CHUNK_ROWS rows at most in memory."""
        rows = sum(part.shape[0] for part in self.parts)
        values = torch.empty(rows, self.parts[0].shape[1], dtype=dtype)
        for index, part in enumerate(self.parts):
            places = None if self.row_part is None else (self.row_part == index).nonzero()[:, 0]
            for start in range(0, part.shape[0], CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, part.shape[0])
                some = part.rows(start, stop).dequantize()
                values[slice(start, stop) if places is None else places[start:stop]] = some.to(dtype)
        return from_matrix(values, self.shape, self.inputs)


def as_matrix(weight: Tensor, inputs: int | None) -> Tensor:
    """A weight of any shape as a matrix [rows, columns]: a row holds what one output multiplies its inputs with.

    `inputs` is the dimension along which the weight is multiplied; None: all but the first, as in a convolution.
    """
    return weight.flatten(1) if inputs is None else weight.movedim(inputs, -1).reshape(-1, weight.shape[inputs])


def from_matrix(matrix: Tensor, shape: Sequence[int], inputs: int | None) -> Tensor:
    """The weight of `shape` whose matrix [rows, columns] this is."""
    if inputs is None:
        return matrix.reshape(tuple(shape))
    others = [size for dim, size in enumerate(shape) if dim != inputs]
    return matrix.reshape(*others, shape[inputs]).movedim(-1, inputs).contiguous()


def pack(part: RowGroup | BlockRows) -> Tensor:
    """The tiles of a part, uint8 [tiles, tile_bytes]; of a type of GGUF its blocks, uint8 [rows, bytes of a row]."""
    if isinstance(part, BlockRows):
        return part.blocks
    fmt, (rows, columns) = part.format, part.shape
    tiles, groups = -(-rows // TILE_ROWS), fmt.groups(columns)
    padding = (0, groups * fmt.group_size - columns, 0, tiles * TILE_ROWS - rows)
    codes = torch.nn.functional.pad(part.codes, padding) if any(padding) else part.codes.contiguous()
    # codes of four columns at a time, which stay together: int32 [tiles, groups, fours, rows of a tile]
    fours = codes.view(torch.int32).view(tiles, TILE_ROWS, groups, -1).permute(0, 2, 3, 1).contiguous()
    planes, shift = [], 0
    for width in PLANES[fmt.bits]:
        planes.append(_plane(fours, width, shift).view(torch.uint8).view(tiles, groups, -1))
        shift += width
    columns_of_tile = [torch.cat(planes, 2).reshape(tiles, -1), _by_tile(part.scales, tiles)]
    columns_of_tile += [_by_tile(side, tiles) for side in (part.zeros, part.minimums) if side is not None]
    factors = torch.zeros(tiles * TILE_ROWS, dtype=torch.bfloat16)
    factors[:rows] = part.factors
    columns_of_tile.append(factors.view(torch.uint8).view(tiles, -1))
    packed = torch.cat(columns_of_tile, 1)
    return torch.nn.functional.pad(packed, (0, fmt.tile_bytes(columns) - packed.shape[1])).contiguous()


def _plane(fours: Tensor, width: int, shift: int) -> Tensor:
    """The `width` bits from `shift` on of codes int32 [tiles, groups, fours, rows], as many side by side as a byte has

    room for: int32 [tiles, groups, bytes of four columns, rows].
    """
    if width == 8:
        return fours
    packed, fields = None, fours.unflatten(2, (-1, 8 // width))
    for field, codes in enumerate(fields.unbind(3)):
        ups = width * field - shift
        moved = codes << ups if ups >= 0 else codes >> -ups
        moved &= _each_byte(((1 << width) - 1) << width * field)
        packed = moved if packed is None else packed.bitwise_or_(moved)
    assert packed is not None, "a byte has a field"
    return packed


def unpack(tiles: Tensor, fmt: Format, rows: int, columns: int, codebook: Tensor | None) -> RowGroup | BlockRows:
    """The part of `tiles` uint8 [tiles, tile_bytes] and `codebook` int8 [levels]. ArtifactError for other sizes."""
    if fmt.block is not None:
        return opened(tiles, fmt, rows, columns)
    count, groups = -(-rows // TILE_ROWS), fmt.groups(columns)
    expected = (count, fmt.tile_bytes(columns))
    if tuple(tiles.shape) != expected or tiles.dtype != torch.uint8:
        raise ArtifactError(
            f"packed tiles are {tiles.dtype} {tuple(tiles.shape)}, but {rows} x {columns} weights as {fmt.name} "
            f"need uint8 {expected}; the file is damaged"
        )
    if (fmt.kind == "codebook") != (codebook is not None):
        raise ArtifactError(f"a {fmt.name} part {'lacks' if codebook is None else 'has no use for'} a codebook")
    if codebook is not None and (codebook.dtype != torch.int8 or tuple(codebook.shape) != (fmt.levels,)):
        found = f"{codebook.dtype} {list(codebook.shape)}"
        raise ArtifactError(f"a {fmt.name} codebook must be int8 [{fmt.levels}], not {found}")
    fours = torch.zeros(count, TILE_ROWS, groups, fmt.group_size // 4, dtype=torch.int32)
    group_bytes = fmt.group_size * TILE_ROWS * fmt.bits // 8
    body = tiles[:, : groups * group_bytes].reshape(count, groups, group_bytes)
    start, shift = 0, 0
    for width in PLANES[fmt.bits]:
        fields, size = 8 // width, fmt.group_size * TILE_ROWS * width // 8
        plane = body[:, :, start : start + size].contiguous().view(torch.int32).view(count, groups, -1, TILE_ROWS)
        plane, view = plane.permute(0, 3, 1, 2), fours.view(count, TILE_ROWS, groups, -1, fields)
        for field in range(fields):
            view[..., field] |= ((plane >> (width * field)) & _each_byte((1 << width) - 1)) << shift
        start, shift = start + size, shift + width
    at, factors_at = groups * group_bytes, fmt.factors_at(columns)  # scales, zero points where there are any, factors
    beside = tiles[:, at:factors_at].contiguous()
    halves = fmt.kind in ("half", "minimum")
    beside = (beside.view(torch.float16) if halves else beside).reshape(count, -1, groups, TILE_ROWS)
    scales, *second = (side.transpose(1, 2).reshape(-1, groups)[:rows].contiguous() for side in beside.unbind(1))
    factors = (
        tiles[:, factors_at : factors_at + 2 * TILE_ROWS].contiguous().view(torch.bfloat16).view(-1)[:rows].clone()
    )
    if not torch.isfinite(factors).all() or (halves and not all(side.isfinite().all() for side in (scales, *second))):
        raise ArtifactError("a packed weight has a row factor or scale that is not finite; the file is damaged")
    flat = fours.view(torch.uint8).view(count * TILE_ROWS, -1)[:rows, :columns].contiguous()
    beside_scales = {"minimums" if halves else "zeros": second[0]} if second else {}
    return RowGroup(fmt, flat, scales, factors, codebook=codebook, **beside_scales)


def _each_byte(value: int) -> int:
    """The int32 whose four bytes are `value`."""
    whole = value * 0x01010101
    return whole - (1 << 32 if whole >> 31 else 0)


def _by_tile(per_group: Tensor, tiles: int) -> Tensor:
    """[rows, groups] of one or two bytes each -> uint8 [tiles, groups * 16 * bytes], group first."""
    rows, groups = per_group.shape
    padded = torch.nn.functional.pad(per_group, (0, 0, 0, tiles * TILE_ROWS - rows))
    return padded.view(tiles, TILE_ROWS, groups).transpose(1, 2).reshape(tiles, -1).view(torch.uint8)
