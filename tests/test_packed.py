"""The packed layout: what goes in comes out, the fast unpacker equals the slow one, sizes are as promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_oracle import unpack_slowly

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.runtime.formats import CODEBOOK_BITS, GROUP_SIZES, KEPT_BITS, PLANES, Format
from gulliver.runtime.packed import PackedTensor, RowGroup, pack, unpack

FORMATS = [Format(bits, size, "uniform") for bits in PLANES for size in GROUP_SIZES] + [
    Format(bits, size, "codebook") for bits in CODEBOOK_BITS for size in GROUP_SIZES
]
FORMATS += [Format(bits, size, kind) for kind, known in KEPT_BITS.items() for bits in known for size in GROUP_SIZES]


def random_part(fmt: Format, rows: int, columns: int, seed: int) -> RowGroup:
    random = torch.Generator().manual_seed(seed)
    groups = fmt.groups(columns)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=random)

    zeros = draw(fmt.levels, rows, groups).to(torch.uint8) if fmt.kind == "uniform" else None
    codebook = (draw(255, fmt.levels) - 127).to(torch.int8) if fmt.kind == "codebook" else None
    factors = torch.randn(rows, generator=random).to(torch.bfloat16)
    codes = draw(fmt.levels, rows, columns).to(torch.uint8)
    if fmt.kind in KEPT_BITS:
        scales, least = (torch.randn(rows, groups, generator=random).to(torch.float16) for _ in range(2))
        return RowGroup(fmt, codes, scales, factors, minimums=least if fmt.kind == "minimum" else None)
    return RowGroup(fmt, codes, draw(256, rows, groups).to(torch.uint8), factors, zeros, codebook)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 50), st.integers(1, 300), st.integers(0, 9))
def test_unpack_returns_what_was_packed(fmt: Format, rows: int, columns: int, seed: int) -> None:
    part = random_part(fmt, rows, columns, seed)
    tiles = pack(part)
    table = fmt.levels if part.codebook is not None else 0
    assert tiles.numel() + table == fmt.packed_bytes(rows, columns)
    back = unpack(tiles, fmt, rows, columns, part.codebook)
    assert torch.equal(back.codes, part.codes)
    assert torch.equal(back.scales, part.scales)
    assert torch.equal(back.factors, part.factors)
    assert torch.equal(back.dequantize(), part.dequantize())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_fast_and_slow_unpackers_agree(fmt: Format) -> None:
    part = random_part(fmt, 19, 70, 3)
    slow = unpack_slowly(pack(part), fmt, 19, 70, part.codebook)
    assert torch.equal(torch.tensor(slow), part.dequantize())


def test_rows_of_several_parts_return_to_their_places() -> None:
    first, second = random_part(Format(8, 32, "uniform"), 3, 40, 1), random_part(Format(3, 64, "codebook"), 5, 40, 2)
    row_part = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1], dtype=torch.uint8)
    values = PackedTensor((8, 40), [first, second], row_part).dequantize()
    assert torch.equal(values[row_part == 0], first.dequantize())
    assert torch.equal(values[row_part == 1], second.dequantize())


def test_tiles_are_aligned_and_cost_what_a_bit_costs() -> None:
    for fmt in FORMATS:
        assert fmt.tile_bytes(576) % 64 == 0
    assert Format(4, 64, "codebook").tile_bytes(576) * 8 / (16 * 576) == pytest.approx(4.17, abs=0.02)


@pytest.mark.parametrize("name", ["u7g64", "c8g64", "u4g48", "x4g64", "u4", "", "u4g"])
def test_an_unknown_format_is_refused_with_its_remedy(name: str) -> None:
    with pytest.raises(ConfigError, match=r"choose|write it like|use uniform"):
        Format.parse(name)


def test_names_round_trip() -> None:
    assert [Format.parse(fmt.name) for fmt in FORMATS] == FORMATS


def test_damaged_tiles_are_refused() -> None:
    fmt = Format(4, 64, "codebook")
    part = random_part(fmt, 16, 64, 0)
    tiles = pack(part)
    with pytest.raises(ArtifactError, match="damaged"):
        unpack(tiles[:, :-64], fmt, 16, 64, part.codebook)
    with pytest.raises(ArtifactError, match="codebook"):
        unpack(tiles, fmt, 16, 64, None)
    part.factors[3] = float("nan")
    with pytest.raises(ArtifactError, match="finite"):
        unpack(pack(part), fmt, 16, 64, part.codebook)
