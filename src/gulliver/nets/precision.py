"""In which type matrices are multiplied: bfloat16 where the CPU has instructions for it, float32 elsewhere.

Where it has none, torch multiplies bfloat16 fifty times as slowly as float32. Instructions are known on Linux alone;
elsewhere products are in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gulliver.core.machine import identify

INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Instruction sets, as Linux spells them, with a product of bfloat16 numbers."""


@cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers itself."""
    return not INSTRUCTIONS.isdisjoint(identify().isa)


def attempts() -> tuple[bool, ...]:
    """Whether products are in bfloat16, as is to be tried in this order: some networks mix types, and need float32."""
    return (True, False) if has_bfloat16() else (False,)


def products_in(half: bool) -> torch.autocast:
    """Products in bfloat16 where `half`, else in their factors' type. A new one each time: it keeps cast weights."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)


def quick(tensor: Tensor) -> Tensor:
    """The tensor, float32 of any shape, in the type of the fastest products: itself, or a copy in bfloat16."""
    return tensor.bfloat16() if has_bfloat16() else tensor
