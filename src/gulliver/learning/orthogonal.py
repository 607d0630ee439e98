"""Muon's update: the momentum of a matrix with all its singular values set to one.

Newton-Schulz steps x <- a x + b (x xT) x + c (x xT)^2 x move every singular value towards one without computing any.
Five steps with the steep coefficients of Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) bring values
from 1e-3 on into 0.7 … 1.2; two with those of the fifth-order Newton-Schulz iteration, whose fixed point one is flat,
bring these to one within 1e-3. The update is multiplied by 0.2 sqrt(max(rows, columns)), so that its root mean square
is that of AdamW and one rate and one decay suit both (Muon is scalable for LLM training, 2025, arXiv 2502.16982).
"""

from __future__ import annotations

import torch
from torch import Tensor

STEEP, FLAT = (3.4445, -4.7750, 2.0315), (15 / 8, -10 / 8, 3 / 8)
STEPS = (*[STEEP] * 5, *[FLAT] * 2)
LIKE_ADAMW = 0.2
"""The root mean square of a typical update of AdamW, in units of the rate."""


def orthogonalized(momentum: Tensor) -> Tensor:
    """The matrix with orthonormal rows or columns nearest to `momentum` […, rows, columns], float32 of its shape."""
    x = momentum.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for a, b, c in STEPS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def matched_scale(rows: int, columns: int) -> float:
    """What an orthogonal update of this shape is multiplied by to be as large as one of AdamW."""
    return LIKE_ADAMW * max(rows, columns) ** 0.5
