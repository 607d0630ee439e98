"""Every instruction set multiplies packed weights like the slow unpacker; sums of integers are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needed import needed_module
from packed_oracle import unpack_slowly
from test_packed import FORMATS, random_part

from gulliver.runtime.formats import SIDE_BYTES
from gulliver.runtime.packed import Format, RowGroup, pack

native = needed_module("gulliver.runtime._native", "the native engine is not built: no compiler was found")

SETS = [name for name, runs, _ in native.instruction_sets() if runs]
BLOCK = 32  # columns that share one scale of the activations
RAGGED = [(1, 1, 1), (16, 32, 2), (17, 33, 3), (5, 130, 5), (40, 257, 8), (33, 300, 16), (20, 2100, 39)]


def product(isa: str, part: RowGroup, x: np.ndarray, tiles: torch.Tensor | None = None) -> np.ndarray:
    """x [batch, columns] times the part's rows, by one instruction set: float32 [batch, rows]."""
    rows, columns = part.shape
    y = np.full((len(x), rows), np.nan, dtype=np.float32)
    codebook = None if part.codebook is None else part.codebook.numpy()
    packed = (pack(part) if tiles is None else tiles).numpy()
    fmt, minimums = part.format, {"half": False, "minimum": True}
    native.product(isa, packed, rows, columns, fmt.bits, fmt.group_size, codebook, x, y, minimums.get(fmt.kind))
    return y


def rounded(x: np.ndarray) -> np.ndarray:
    """What int8 blocks of 32 make of x [batch, columns], none of whose rows is zero: float64.

    A row's largest number decides the scale of its block; the others have the smallest scale that leaves room for their
    own, out of this one over 2^n times 1, 1 1/8, ... 1 7/8.
    """
    out = np.zeros(x.shape)
    largest = np.abs(x).max(axis=1, keepdims=True)
    for start in range(0, x.shape[1], BLOCK):
        block = x[:, start : start + BLOCK]
        share = np.maximum(np.abs(block).max(axis=1, keepdims=True) / largest, np.float32(2.0**-40)).astype(np.float64)
        power = 2.0 ** np.floor(np.log2(share))
        share = np.minimum(power * (1 + np.ceil((share / power - 1) * 8) / 8), 1.0)
        levels = np.rint(block * (np.float32(127) / largest / share))
        out[:, start : start + BLOCK] = levels * (largest / np.float32(127) * share)
    return out


def assert_product(isa: str, part: RowGroup, weights: np.ndarray, x: np.ndarray) -> None:
    """Within float32's rounding of the sum over blocks, measured against the sum of the terms' sizes."""
    inputs = rounded(x)
    wanted, size = inputs @ weights.T, np.abs(inputs) @ np.abs(weights.T)
    assert (np.abs(product(isa, part, x) - wanted) <= 4e-6 * size + 1e-30).all(), isa


def normal(batch: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, columns)).astype(np.float32)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_products_agree_with_the_slow_unpacker(isa: str, fmt: Format) -> None:
    rows, columns = 19, 70
    part = random_part(fmt, rows, columns, 3)
    weights = np.array(unpack_slowly(pack(part), fmt, rows, columns, part.codebook))
    for batch in (1, 2, 3, 7, 16):
        assert_product(isa, part, weights, normal(batch, columns, batch))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_products_at_ragged_shapes(isa: str, fmt: Format) -> None:
    for rows, columns, batch in RAGGED:
        part = random_part(fmt, rows, columns, rows)
        assert_product(isa, part, part.dequantize().double().numpy(), normal(batch, columns, columns))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SETS),
    st.sampled_from(FORMATS),
    st.integers(1, 50),
    st.integers(1, 400),
    st.integers(1, 16),
    st.integers(0, 9),
)
def test_products_at_any_shape(isa: str, fmt: Format, rows: int, columns: int, batch: int, seed: int) -> None:
    part = random_part(fmt, rows, columns, seed)
    assert_product(isa, part, part.dequantize().double().numpy(), normal(batch, columns, seed))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_integer_sums_are_exact_on_every_set(fmt: Format) -> None:
    """Scales of one and whole activations whose block reaches 127: each result is a whole number below 2^24."""
    part = random_part(fmt, 21, 200, 5)
    part.scales.fill_(1)
    part.factors.fill_(1.0)
    if part.minimums is not None:
        part.minimums.copy_(part.minimums.round())
    whole = np.random.default_rng(7).integers(-127, 128, (16, 200))
    whole[:, ::BLOCK] = 127
    if part.codebook is not None:
        part.codebook[:2] = torch.tensor([-128, 127], dtype=torch.int8)
    wanted = whole @ part.dequantize().long().numpy().T
    for isa in SETS:
        for batch in (1, 3, 16):
            assert (product(isa, part, whole[:batch].astype(np.float32)) == wanted[:batch]).all(), isa


@pytest.mark.parametrize("isa", SETS)
def test_the_largest_codes_and_activations_do_not_saturate(isa: str) -> None:
    for fmt in FORMATS:
        part = random_part(fmt, 16, 256, 1)
        part.codes.fill_(fmt.levels - 1)
        part.scales.fill_(1)
        part.factors.fill_(1.0)
        if part.zeros is not None:
            part.zeros.fill_(0)
        if part.codebook is not None:
            part.codebook.fill_(127)
        if part.minimums is not None:
            part.minimums.fill_(0)
        x = np.full((2, 256), 127, dtype=np.float32)
        x[1] = -127
        level = 127 if part.codebook is not None else fmt.levels // (2 if fmt.kind == "half" else 1) - 1
        assert (product(isa, part, x) == np.array([[1], [-1]]) * 127 * 256 * level).all(), fmt.name


@pytest.mark.parametrize("isa", SETS)
def test_padding_may_hold_anything(isa: str) -> None:
    for fmt in FORMATS:
        part = random_part(fmt, 5, 70, 2)
        groups, codes = fmt.groups(70), fmt.groups(70) * fmt.group_size * 2 * fmt.bits
        each = 2 if fmt.kind in ("half", "minimum") else 1
        sides = groups * SIDE_BYTES[fmt.kind]
        ragged = torch.nn.functional.pad(part.codes, (0, groups * fmt.group_size - 70), value=fmt.levels - 1)
        wide = RowGroup(fmt, ragged, part.scales, part.factors, part.zeros, part.codebook, part.minimums)
        tiles = pack(wide)
        for lane in range(5, 16):
            for side in range(sides // each):
                at = codes + each * (16 * side + lane)
                tiles[0, at : at + each] = 255
            at = codes + 16 * sides + 2 * lane
            tiles[0, at : at + 2] = torch.tensor([0xFF, 0x7F], dtype=torch.uint8)  # not a number
        x = normal(4, 70, 1)
        assert (product(isa, part, x, tiles) == product(isa, part, x)).all(), fmt.name


@pytest.mark.parametrize("isa", SETS)
def test_activations_that_are_no_numbers_stay_in_their_row_and_end_finite(isa: str) -> None:
    part = random_part(Format(4, 64, "uniform"), 20, 100, 4)
    x = normal(3, 100, 2)
    x[1, 7], x[1, 40], x[1, 70] = np.nan, 1e-40, -np.nan
    y = product(isa, part, x)
    assert np.isfinite(y).all()
    clean = x[[0, 2]]
    assert (y[[0, 2]] == product(isa, part, clean)).all()


def test_every_set_is_listed_with_a_reason_and_an_unknown_one_is_refused() -> None:
    listed = native.instruction_sets()
    assert [name for name, _, _ in listed] == ["avx512-vnni", "avx2-vnni", "avx2", "neon", "plain"]
    assert all(why for _, _, why in listed)
    assert SETS[-1] == "plain"
    part, x = random_part(Format(4, 64, "uniform"), 3, 10, 0), normal(1, 10, 0)
    assert (product("auto", part, x) == product(SETS[0], part, x)).all()
    with pytest.raises(ValueError, match=r"no instruction set sse9; choose auto or one of avx512-vnni, .*plain"):
        product("sse9", part, x)
    for name in {name for name, _, _ in listed} - set(SETS):
        with pytest.raises(ValueError, match=f"{name} cannot run here: .*; choose auto"):
            product(name, part, x)


def test_tiles_of_another_size_are_refused() -> None:
    part, x = random_part(Format(3, 32, "codebook"), 20, 40, 0), normal(1, 40, 0)
    with pytest.raises(ValueError, match="the tiles have another size"):
        product(SETS[0], part, x, pack(part)[:1])
    with pytest.raises(ValueError, match="the tiles have another size"):
        product(SETS[0], part, x, pack(part)[:, :-64].contiguous())
    with pytest.raises(ValueError, match="1 to 256"):
        product(SETS[0], part, normal(257, 40, 0))
