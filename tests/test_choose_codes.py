"""Choosing codes natively and with torch: the same codes but for rounding, whatever the grid and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from needed import needed_module
from torch import Tensor

from gulliver.compress.choose import GroupGrid, chosen
from gulliver.compress.gptq import quantize_matrix
from gulliver.runtime.blocks import BlockRows
from gulliver.runtime.formats import BLOCK_TYPES, Format
from gulliver.runtime.grid import Lookup, fit_codebook_grid
from gulliver.runtime.packed import RowGroup

native = needed_module("gulliver.runtime._native", "the native engine is not built: no compiler was found")

ROWS = 67  # no multiple of a tile, nor of the strips that native code works on
TILES = ("c2g64", "c3g32", "c4g64", "c5g128", "u4g64", "u8g32", "s4g64")
SETS = [name for name, here, _ in native.instruction_sets() if here]


def with_torch(patch: pytest.MonkeyPatch) -> None:
    for module in ("compress.choose", "runtime.grid"):
        patch.setattr(f"gulliver.{module}.native", None)


def problem(fmt: Format) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] with a row of zeros, whose last group is cut short where it may be, and a moment."""
    draw, columns = torch.Generator().manual_seed(5), 256 if fmt.block or fmt.kind == "symmetric" else 250
    weight = torch.randn(ROWS, columns, generator=draw) * 0.02 * (0.3 + torch.rand(1, columns, generator=draw))
    weight[5] = 0
    inputs = torch.randn(512, columns, generator=draw)
    inputs = inputs @ (torch.eye(columns) + 0.05 * torch.randn(columns, columns, generator=draw))
    return weight, inputs.t() @ inputs / len(inputs)


def stored(part: RowGroup | BlockRows) -> Tensor:
    return part.blocks if isinstance(part, BlockRows) else part.codes


def loss(part: RowGroup | BlockRows, weight: Tensor, moment: Tensor) -> float:
    off = weight - part.dequantize()
    return float((off @ moment * off).sum())


@pytest.mark.parametrize("name", [*TILES, *BLOCK_TYPES])
def test_both_paths_choose_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = Format.parse(name)
    weight, moment = problem(fmt)
    ways: list[dict[str, Any]] = [{"gptq": False}, {"sweeps": 0}, {"sweeps": 1}, {"sweeps": 3}]
    fast = [quantize_matrix(weight, fmt, moment, **way) for way in ways]
    with_torch(monkeypatch)
    for way, one in zip(ways, fast, strict=True):
        slow = quantize_matrix(weight, fmt, moment, **way)
        assert loss(one, weight, moment) == pytest.approx(loss(slow, weight, moment), rel=1e-3), way
        if not way.get("sweeps"):
            assert (stored(one) == stored(slow)).float().mean() > 0.999, way


def grids(levels: Lookup | int) -> GroupGrid:
    """One for each row, some with a scale of 0, or a negative one."""
    draw = torch.Generator().manual_seed(2)
    scale = torch.randn(ROWS, generator=draw)
    scale[:3] = 0
    zero = torch.zeros(ROWS) if isinstance(levels, Lookup) else torch.randint(0, 16, (ROWS,), generator=draw).float()
    return GroupGrid(scale, zero, torch.rand(ROWS, generator=draw), levels)


CODEBOOK = torch.tensor([-127, -60, -33, -9, 2, 11, 50, 101], dtype=torch.int8)
LEVELS = {"codebook": Lookup(CODEBOOK), "fractions": Lookup(CODEBOOK / 127), "even": 16, "bytes": 256}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_rounds_as_torch_does(
    isa: str, levels: str, backwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, draw = grids(LEVELS[levels]), torch.Generator().manual_seed(1)
    local, base = (torch.randn(33, ROWS, generator=draw) * 8 for _ in range(2))
    effect = torch.randn(33, 33, generator=draw) * 0.05
    on_one_set(monkeypatch, isa)
    codes, values = chosen(local.clone(), base, effect, grid, backwards=backwards)
    alone, _ = chosen(local.clone(), base, None, grid, backwards=backwards)
    assert (codes != alone).float().mean() > 0.02, "nothing was passed on"
    with_torch(monkeypatch)
    expected, wanted = chosen(local.clone(), base, effect, grid, backwards=backwards)
    same = (codes == expected).all(0)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(values[:, same], wanted[:, same], rtol=1e-5, atol=1e-4)
    assert torch.equal(alone, chosen(local.clone(), base, None, grid, backwards=backwards)[0])


def on_one_set(patch: pytest.MonkeyPatch, isa: str) -> None:
    """Native code on an instruction set that is not the best."""

    class One:
        def choose_codes(self, _: str, *values: Any, **named: Any) -> None:
            native.choose_codes(isa, *values, **named)

    patch.setattr("gulliver.compress.choose.native", One())


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("isa", [*SETS, "torch"])
def test_what_is_not_finite_stays_in_its_row(isa: str, levels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, draw = grids(LEVELS[levels]), torch.Generator().manual_seed(1)
    local, effect = torch.randn(9, ROWS, generator=draw), torch.randn(9, 9, generator=draw)
    if isa == "torch":
        with_torch(monkeypatch)
    else:
        on_one_set(monkeypatch, isa)
    expected = chosen(local.clone(), local, effect, grid, backwards=False)
    bad, rows = local.clone(), torch.tensor([1, 7, 20, 33, 50, 66])
    bad[:, rows] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, torch.nan])
    grid.scale[40], grid.minimum[41], grid.zero[42] = torch.nan, torch.inf, -torch.inf
    codes, values = chosen(bad.clone(), bad, effect, grid, backwards=False)
    count = 8 if isinstance(LEVELS[levels], Lookup) else LEVELS[levels]
    assert int(codes.max()) < count  # type: ignore[operator]
    others = torch.ones(ROWS, dtype=torch.bool)
    others[rows] = others[40:43] = False
    assert torch.equal(codes[:, others], expected[0][:, others])
    assert torch.equal(values[:, others], expected[1][:, others])


@pytest.mark.parametrize("columns", [1, 31, 64, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_native_code_fits_the_same_scales(columns: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, lookup = torch.Generator().manual_seed(4), Lookup(CODEBOOK)
    groups = torch.randn(200, columns, generator=draw)
    groups[3], groups[7, 0] = 0, torch.nan
    importance = torch.rand(1 if shared else 200, columns, generator=draw) + 0.01
    found = fit_codebook_grid(groups, importance, lookup).scales
    with_torch(monkeypatch)
    wanted = fit_codebook_grid(groups, importance, lookup).scales
    close = torch.isclose(found, wanted, rtol=1e-4)
    close[7] = True
    assert close.float().mean() >= 0.98  # two shrinks may fit equally well
    assert float(found[3]) == pytest.approx(float(wanted[3]))


def test_other_shapes_are_refused() -> None:
    def call(**changed: Any) -> None:
        given: dict[str, Any] = {
            "local": torch.zeros(4, 6), "base": torch.zeros(4, 6), "effect": torch.zeros(4, 4), "scale": torch.ones(6),
            "zero": torch.zeros(6), "minimum": torch.zeros(6), "levels": 16, "table": None, "backwards": False,
            "codes": torch.zeros(4, 6, dtype=torch.uint8),
        }  # fmt: skip
        given.update(changed)
        tensors = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in given.items()}
        native.choose_codes("auto", **tensors)

    call()
    bytes_, floats = torch.zeros(5, dtype=torch.uint8).numpy(), torch.zeros(5).numpy()
    call(levels=0, table=(bytes_, floats, 2.0))
    wrong: list[dict[str, Any]] = [
        {"base": torch.zeros(4, 5)},
        {"codes": torch.zeros(3, 6, dtype=torch.uint8)},
        {"effect": torch.zeros(4, 3)},
        {"scale": torch.ones(5)},
        {"minimum": torch.ones(7)},
        {"levels": 0},
        {"levels": 257},
        {"levels": 16, "table": (bytes_, floats, 2.0)},
        {"levels": 0, "table": (bytes_[:4], floats[:4], 2.0)},
        {"levels": 0, "table": (bytes_, floats[:3], 2.0)},
        {"local": torch.zeros(300, 6), "base": torch.zeros(300, 6)},
    ]
    for one in wrong:
        with pytest.raises(ValueError):
            call(**one)
    with pytest.raises(TypeError):  # a copy would be changed in its place
        call(local=torch.zeros(6, 4).t())
