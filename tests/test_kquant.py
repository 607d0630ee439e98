"""GGUF's block types: their bytes against the gguf package, rounding under their constraints, and what is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from gulliver.compress.gptq import quantize_matrix
from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.runtime.blocks import BlockRows, encode, opened
from gulliver.runtime.formats import BLOCK_TYPES, Format
from gulliver.runtime.packed import PackedTensor

ROWS, COLUMNS = 48, 512


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] of uneven columns, and the second moment of correlated inputs."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, COLUMNS, generator=draw) * 0.02 * (0.3 + torch.rand(1, COLUMNS, generator=draw))
    mixing = torch.eye(COLUMNS) + 0.05 * torch.randn(COLUMNS, COLUMNS, generator=draw)
    inputs = torch.randn(1024, COLUMNS, generator=draw) @ mixing
    return weight, inputs.t() @ inputs / len(inputs)


def error(part: object, weight: Tensor, moment: Tensor) -> float:
    assert isinstance(part, BlockRows)
    delta = part.dequantize() - weight
    return float((delta @ moment * delta).sum() / (weight @ moment * weight).sum())


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_bytes_hold_what_was_put_into_them(name: str) -> None:
    kind, fmt, draw = BLOCK_TYPES[name], Format.of_block(name), np.random.default_rng(1)
    groups, blocks = COLUMNS // kind.group_size, COLUMNS // kind.columns
    codes = draw.integers(0, len(kind.levels), (ROWS, COLUMNS)).astype(np.uint8)
    scales = draw.integers(kind.scale_codes[0], kind.scale_codes[1] + 1, (ROWS, groups)).astype(np.int16)
    least, most = kind.minimum_codes or (0, 0)
    minima = draw.integers(least, most + 1, (ROWS, groups)).astype(np.int16)
    d, e = (draw.normal(0, 0.01, (ROWS, blocks)).astype(np.float16) for _ in range(2))
    stored = encode(fmt, codes, scales, minima, d, e)
    assert stored.shape == (ROWS, fmt.packed_bytes(1, COLUMNS))
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.columns, kind.size_bytes)
    levels = np.array(kind.levels, np.float32)[codes].reshape(ROWS, groups, -1)
    wide = (np.repeat(one.astype(np.float32), groups // blocks, 1)[:, :, None] for one in (d, e))
    d_wide, e_wide = wide
    expected = d_wide * scales[:, :, None] * levels - e_wide * minima[:, :, None]
    found = gguf.dequantize(stored, gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(found, expected.reshape(ROWS, COLUMNS), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_gptq_beats_rounding_to_nearest(name: str, layer: tuple[Tensor, Tensor]) -> None:
    weight, moment = layer
    nearest, passed = (
        error(quantize_matrix(weight, Format.of_block(name), moment, gptq=one), *layer) for one in (0, 1)
    )
    assert passed < 0.75 * nearest


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_each_sweep_over_the_codes_leaves_less(name: str, layer: tuple[Tensor, Tensor]) -> None:
    weight, moment = layer
    chosen = [error(quantize_matrix(weight, Format.of_block(name), moment, sweeps=n), *layer) for n in (0, 1, 3)]
    assert chosen[2] < chosen[1] < 0.98 * chosen[0]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_ours_beat_the_packages_own(name: str, layer: tuple[Tensor, Tensor]) -> None:
    weight, moment = layer
    kind = gguf.GGMLQuantizationType[name]
    theirs = BlockRows(Format.of_block(name), torch.from_numpy(gguf.quantize(weight.numpy(), kind)))
    ours = quantize_matrix(weight, Format.of_block(name), moment, gptq=False)
    assert error(ours, *layer) < 1.001 * error(theirs, *layer)
    assert error(quantize_matrix(weight, Format.of_block(name), moment), *layer) < 0.7 * error(theirs, *layer)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("weight", [torch.zeros(3, 256), torch.full((3, 256), 1e-9), torch.full((3, 256), -3e4)])
def test_flat_rows(name: str, weight: Tensor) -> None:
    for moment in (None, torch.eye(256)):
        values = quantize_matrix(weight, Format.of_block(name), moment, sweeps=2).dequantize()
        assert torch.isfinite(values).all()
        assert (values - weight).abs().max() <= 0.05 * weight.abs().max() + 1e-6


def test_more_bytes_are_better(layer: tuple[Tensor, Tensor]) -> None:
    chain = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
    errors = [error(quantize_matrix(layer[0], Format.of_block(name), layer[1]), *layer) for name in chain]
    assert errors == sorted(errors, reverse=True)


def test_what_is_damaged_is_refused() -> None:
    fmt = Format.of_block("Q4_K")
    good = torch.zeros(4, fmt.packed_bytes(1, 256), dtype=torch.uint8)
    assert opened(good, fmt, 4, 256).shape == (4, 256)
    for wrong, columns in ((good[:, :-1], 256), (good, 512), (good.to(torch.int8), 256), (good, 255)):
        with pytest.raises(ArtifactError, match="damaged"):
            opened(wrong, fmt, 4, columns)
    good[2, 1] = 0x7C  # an infinite scale
    with pytest.raises(ArtifactError, match="not finite"):
        opened(good, fmt, 4, 256)


def test_blocks_are_no_tiles() -> None:
    part = BlockRows(Format.of_block("Q8_0"), torch.zeros(4, 34, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="fitted for gguf: it is stored as Q8_0"):
        _ = PackedTensor((4, 32), [part]).in_tiles


def test_names() -> None:
    for name in BLOCK_TYPES:
        assert Format.parse(name).name == name and Format.parse(name).block is BLOCK_TYPES[name]
    with pytest.raises(ConfigError):
        Format.parse("Q4_X")
