"""The formats of packed weights: names, sizes and the numbers that the tile layout is made of. Knows no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gulliver.core.errors import ConfigError

TILE_ROWS = 16
ALIGNMENT = 64
GROUP_SIZES = (32, 64, 128)
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of a code -> widths of its planes, low bits first."""
CODEBOOK_BITS = (2, 3, 4, 5, 6)
KINDS = ("codebook", "uniform", "half", "minimum", "symmetric")
"""Kinds of values; a short name begins with the first letter."""
SIDE_BYTES = {"codebook": 1, "uniform": 2, "half": 2, "minimum": 4}
"""Bytes beside the codes, for each row and group: scale, that and zero point, float16 scale, that and minimum."""
KEPT_BITS = {"half": (2, 4, 5, 8), "minimum": (4, 5)}
"""Bits of the kinds that other tools' blocks are kept in as they came; no plan chooses them."""


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF (runtime/blocks.py): `size_bytes` for `columns` columns, `group_size` of which share a scale.

    `levels` are the values of its codes before scaling. `scale_codes` and `minimum_codes` are the least and largest
    code of a group's scale and minimum; (1, 1) where the block's float16 is the number itself, None where there is no
    minimum. `halves_at` are the bytes of a block at which its float16 numbers begin.
    """

    columns: int
    size_bytes: int
    group_size: int
    levels: tuple[int, ...]
    halves_at: tuple[int, ...]
    scale_codes: tuple[int, int] = (1, 1)
    minimum_codes: tuple[int, int] | None = None

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()


_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q2_K": BlockType(256, 84, 16, tuple(range(4)), (80, 82), (0, 15), (0, 15)),
    "Q3_K": BlockType(256, 110, 16, tuple(range(-4, 4)), (108,), (-32, 31)),
    "IQ4_XS": BlockType(256, 136, 32, _NONLINEAR, (0,), (-32, 31)),
    "Q4_K": BlockType(256, 144, 32, tuple(range(16)), (0, 2), (0, 63), (0, 63)),
    "IQ4_NL": BlockType(32, 18, 32, _NONLINEAR, (0,)),
    "Q4_0": BlockType(32, 18, 32, tuple(range(-8, 8)), (0,)),
    "Q4_1": BlockType(32, 20, 32, tuple(range(16)), (0, 2), (1, 1), (1, 1)),
    "Q5_K": BlockType(256, 176, 32, tuple(range(32)), (0, 2), (0, 63), (0, 63)),
    "Q5_0": BlockType(32, 22, 32, tuple(range(-16, 16)), (0,)),
    "Q5_1": BlockType(32, 24, 32, tuple(range(32)), (0, 2), (1, 1), (1, 1)),
    "Q6_K": BlockType(256, 210, 16, tuple(range(-32, 32)), (208,), (-128, 127)),
    "Q8_0": BlockType(32, 34, 32, tuple(range(-128, 128)), (0,)),
}
"""The types of GGUF that weights are packed in, by rising bytes."""


@dataclass(frozen=True, order=True)
class Format:
    """How one part of a weight is stored: `bits` a code, one scale for `group_size` columns, `kind` of values."""

    bits: int
    group_size: int
    kind: str  # one of KINDS, or a name of BLOCK_TYPES

    def __post_init__(self) -> None:
        if self.block is not None:
            assert (self.bits, self.group_size) == (self.block.bits, self.block.group_size), self
            return
        if self.bits not in PLANES:
            raise ConfigError(f"bits is {self.bits}; choose one of {', '.join(map(str, PLANES))}")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size is {self.group_size}; choose one of {', '.join(map(str, GROUP_SIZES))}")
        if self.kind not in KINDS:
            raise ConfigError(f"kind is {self.kind!r}; choose {', '.join(KINDS)}")
        if self.bits not in KEPT_BITS.get(self.kind, PLANES):
            told = ", ".join(map(str, KEPT_BITS[self.kind]))
            raise ConfigError(f"bits is {self.bits}; with kind {self.kind} choose one of {told}")
        if self.kind == "codebook" and self.bits not in CODEBOOK_BITS:
            raise ConfigError(f"a codebook has 2 to 6 bits, not {self.bits}; use uniform")

    @staticmethod
    def of_block(name: str) -> Format:
        """The format of a name of BLOCK_TYPES."""
        return Format(BLOCK_TYPES[name].bits, BLOCK_TYPES[name].group_size, name)

    @property
    def block(self) -> BlockType | None:
        """The type of GGUF that this is; None for tiles."""
        return BLOCK_TYPES.get(self.kind)

    @property
    def name(self) -> str:
        """Short name: a kind's first letter, bits and group size as in "u4g64" (uniform), or a type of GGUF."""
        return self.kind if self.block else f"{self.kind[0]}{self.bits}g{self.group_size}"

    @property
    def tiles(self) -> Format:
        """The format that a model folder stores it in."""
        return Format(self.bits, self.group_size, "uniform") if self.kind == "symmetric" else self

    @property
    def top_scale(self) -> int:
        """The largest code of a group's scale. With symmetric values, times a level it has 11 bits at most."""
        return min(255, (1 << (12 - self.bits)) - 1) if self.kind == "symmetric" else 255

    @property
    def nesting(self) -> tuple[int, int]:
        """Columns that are rounded in a row because they share something: of a block, and of a group in it."""
        return self.block.columns if self.block else self.group_size, self.group_size

    def holds(self, columns: int) -> bool:
        """Whether a row of so many columns can be stored: whole blocks or groups; tiles are padded."""
        if self.kind == "symmetric":
            return columns % self.group_size == 0
        return self.block is None or columns % self.block.columns == 0

    @staticmethod
    def parse(name: str) -> Format:
        """The format of a short name. ConfigError for any other text."""
        if name in BLOCK_TYPES:
            return Format.of_block(name)
        found = re.fullmatch(r"([uchms])([1-9])g([1-9][0-9]{0,4})", name)
        if not found:
            raise ConfigError(f"{name[:40]!r} is not a format; write it like u4g64, c4g64 or Q4_K")
        return Format(int(found[2]), int(found[3]), next(kind for kind in KINDS if kind[0] == found[1]))

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def groups(self, columns: int) -> int:
        return -(-columns // self.group_size)

    def factors_at(self, columns: int) -> int:
        """Where in a tile its 16 row factors begin, in bytes."""
        groups = self.groups(columns)
        codes = groups * self.group_size * TILE_ROWS * self.bits // 8
        return codes + groups * TILE_ROWS * SIDE_BYTES[self.kind]

    def tile_bytes(self, columns: int) -> int:
        """Bytes of one tile of 16 rows, padding included."""
        raw = self.factors_at(columns) + 2 * TILE_ROWS
        return -(-raw // ALIGNMENT) * ALIGNMENT

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Bytes on disk of a part of `rows` rows, without the file header; of symmetric values in the larger file."""
        if self.block is not None:
            return rows * columns // self.block.columns * self.block.size_bytes
        if self.kind == "symmetric":
            return max(self.tiles.packed_bytes(rows, columns), self._word_bytes(rows, columns))
        table = self.levels if self.kind == "codebook" else 0
        return -(-rows // TILE_ROWS) * self.tile_bytes(columns) + table

    def _word_bytes(self, rows: int, columns: int) -> int:
        """Bytes in compressed-tensors: codes in words of 32 bits, float16 scales, and the shape."""
        return 4 * rows * -(-columns * self.bits // 32) + 2 * rows * self.groups(columns) + 16
