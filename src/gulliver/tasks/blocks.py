"""What a network consists of for a stage: blocks that data stream through, weights that may be packed, couplings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """One stage of the sequence through which calibration streams.

    `weights` names the parameters that may be packed ("model.layers.0.mlp.up_proj.weight"): matrices and stacks of
    them; how one is used shows when data pass. `forward(x, index)` maps the activations [examples, …] of calibration
    batch `index` before the block to those after it; for the first block `x` is the batch itself. Only parameters under
    `prefixes` must hold data while it runs. A `pointwise` block may be given any of the positions [examples, some, …].
    """

    name: str
    prefixes: tuple[str, ...]
    weights: tuple[str, ...]
    forward: Callable[[Any, int], Tensor]
    pointwise: bool = False


def packable(model: nn.Module, prefixes: tuple[str, ...] = ("",)) -> tuple[str, ...]:
    """Names of the parameters under `prefixes` that are matrices or stacks of them, in the network's order."""
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and parameter.is_floating_point() and name.startswith(prefixes)
    )


def packed_names(blocks: Sequence[Block]) -> list[str]:
    """All weights of these blocks that may be packed."""
    return [name for block in blocks for name in block.weights]


@dataclass(frozen=True)
class Coupling:
    """Units that can only be removed together (attention heads, neurons, channels): unit k is, in every member,

    the `size` consecutive rows (dim 0) or columns (dim 1) from k * size on. Removing a unit from all members gives a
    smaller network whose other units compute what they did.
    """

    name: str
    units: int
    members: tuple[tuple[str, int, int], ...]  # (parameter name, dim, size)
