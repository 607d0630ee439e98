"""The formats of packed weights: names, sizes and the numbers that the tile layout is made of. Knows no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gulliver.core.errors import ConfigError

TILE_ROWS = 16
ALIGNMENT = 64
GROUP_SIZES = (32, 64, 128)
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of a code -> widths of its planes, low bits first."""
CODEBOOK_BITS = (2, 3, 4, 5, 6)
KINDS = ("codebook", "uniform", "half", "minimum")
"""Kinds of values; a short name begins with the first letter."""
SIDE_BYTES = {"codebook": 1, "uniform": 2, "half": 2, "minimum": 4}
"""Bytes beside the codes, for each row and group: scale, that and zero point, float16 scale, that and minimum."""
KEPT_BITS = {"half": (2, 4, 5, 8), "minimum": (4, 5)}
"""Bits of the kinds that other tools' blocks are kept in as they came; no plan chooses them."""


@dataclass(frozen=True, order=True)
class Format:
    """How one part of a weight is stored: `bits` a code, one scale for `group_size` columns, `kind` of values."""

    bits: int
    group_size: int
    kind: str  # one of KINDS

    def __post_init__(self) -> None:
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

    @property
    def name(self) -> str:
        """Short name: "u4g64" (uniform), "c4g64" (codebook), "h4g32" (half) or "m4g32" (minimum)."""
        return f"{self.kind[0]}{self.bits}g{self.group_size}"

    @staticmethod
    def parse(name: str) -> Format:
        """The format of a short name. ConfigError for any other text."""
        found = re.fullmatch(r"([uchm])([1-9])g([1-9][0-9]{0,4})", name)
        if not found:
            raise ConfigError(f"{name[:40]!r} is not a format; write it like u4g64 (uniform) or c4g64 (codebook)")
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
        """Bytes on disk of a part of `rows` rows, without the file header."""
        table = self.levels if self.kind == "codebook" else 0
        return -(-rows // TILE_ROWS) * self.tile_bytes(columns) + table
