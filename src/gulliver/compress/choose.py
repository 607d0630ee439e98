"""The grid that some columns share, and choosing their codes one column after another.

What rounding a column changes is passed on to the columns still to come, at once; with native code that is done for few
rows at a time (runtime/native/choose.inc), else for all rows of a column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gulliver.runtime.compiled import native
from gulliver.runtime.grid import Lookup


@dataclass(frozen=True)
class GroupGrid:
    """The values of a group of columns, in each of some rows: (level - zero) · scale - minimum.

    `scale`, `zero` and `minimum` float32 [rows]; a scale of 0 takes the level nearest to `zero`. `levels` are those of
    a lookup; or how many there are from 0 on, each its own code.
    """

    scale: Tensor
    zero: Tensor
    minimum: Tensor
    levels: Lookup | int


def chosen(
    local: Tensor, base: Tensor, effect: Tensor | None, grid: GroupGrid, *, backwards: bool
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and values of columns `local` [columns, rows], visited from the first to the last or `backwards`.

    Each column takes the nearest values; what they add to its `base` [columns, rows], times effect[i, j] of `effect`
    [columns, columns], is added to every column j still to come; None: to none. `local` becomes the values.
    """
    codes, levels, lookup = torch.empty(local.shape, dtype=torch.uint8), grid.levels, None
    if isinstance(levels, Lookup):
        levels, lookup = 0, levels
    if native is not None:
        native.choose_codes(
            "auto",
            local.numpy(),
            base.numpy(),
            None if effect is None else effect.numpy(),
            scale=grid.scale.numpy(),
            zero=grid.zero.numpy(),
            minimum=grid.minimum.numpy(),
            levels=levels,
            table=None if lookup is None else lookup.table,
            backwards=backwards,
            codes=codes.numpy(),
        )
        return codes, local
    count, divisor = len(local), torch.where(grid.scale == 0, torch.inf, grid.scale)
    for index in range(count - 1, -1, -1) if backwards else range(count):
        scaled = (local[index] + grid.minimum).div_(divisor).add_(grid.zero)
        if lookup is not None:
            places = lookup.places(scaled)
            codes[index], level = lookup.codes.index_select(0, places), lookup.entries.index_select(0, places)
        else:
            codes[index] = level = scaled.round_().clamp_(0, levels - 1).nan_to_num_(0)
        value = level.sub(grid.zero).mul_(grid.scale).sub_(grid.minimum)
        if effect is not None:
            rest = slice(index) if backwards else slice(index + 1, count)
            local[rest].addr_(effect[index, rest], value - base[index])
        local[index] = value
    return codes, local
