"""Packed weights as something that can be trained: latent values rounded to a grid whose scales are trained too.

With latent w, group scale s and grid values c, the forward pass uses v = s · c[q], q the nearest to w / s; the backward
pass takes the rounding as if it were not there (straight-through: Bengio et al., 2013, arXiv 1308.3432), so that with
u = dL/dv, dL/dw = u and dL/ds = Σ u · (c[q] - w / s) over the group (learned step size: Esser et al., 2019, arXiv
1902.08153). A latent starts at the parent's weight, moved into the cell of the code that GPTQ chose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gulliver.runtime.grid import SCALE_LEVELS, midpoints, nearest, row_factors, split_scales
from gulliver.runtime.packed import PackedTensor, RowGroup, as_matrix, from_matrix

INSIDE = 0.15
"""A latent that lies outside its cell is put this far inside, as a fraction of the distance between two values.

Far enough that the first updates do not undo what GPTQ chose.
"""
FINE = 8192


class Rounded(torch.autograd.Function):
    """(latent [rows, columns], change and scale [rows, groups], grid) -> rounded values [rows, columns].

    All float32; gradients as this module's head says.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, change: Tensor, scale: Tensor, grid: LatentGrid) -> Tensor:
        scales = scale * change.exp()
        scaled = grid.scaled(latent, scales)
        values = grid.nearest_values(scaled)
        ctx.save_for_backward((values - scaled).to(torch.bfloat16), scales)
        return (values * scales[:, :, None]).flatten(1)[:, : latent.shape[1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        """Gradients of latent [rows, columns] and change [rows, groups]."""
        errors, scales = ctx.saved_tensors
        padded = nn.functional.pad(grad, (0, errors.shape[1] * errors.shape[2] - grad.shape[1])).view(errors.shape)
        return grad, (padded * errors).sum(2) * scales, None, None


class LatentGrid:
    """The values that one part's codes stand for, in units of the scale: a codebook, or integers less a zero point."""

    def __init__(self, part: RowGroup) -> None:
        self.size, self.levels = part.format.group_size, part.format.levels
        entries = None if part.codebook is None else part.codebook.float()
        self.sorted, self.order = (None, None) if entries is None else (entries.sort().values, entries.argsort())
        self.table: Tensor | None = None
        self.low, self.fine = 0.0, 1.0
        self.zeros = torch.zeros(1) if part.zeros is None else part.zeros.float()[:, :, None]

    def scaled(self, latent: Tensor, scales: Tensor) -> Tensor:
        """[rows, columns] -> [rows, groups, group_size] in units of the scale."""
        spare = scales.shape[1] * self.size - latent.shape[1]
        return nn.functional.pad(latent, (0, spare)).view(len(latent), -1, self.size) / scales[:, :, None]

    def codes(self, scaled: Tensor) -> Tensor:
        """[rows, groups, group_size] -> index of the nearest value in sorted order; int32 (codebook) or float32."""
        if self.sorted is not None:
            return nearest(scaled, midpoints(self.sorted))
        return torch.round(scaled + self.zeros).clamp_(0, self.levels - 1)

    def nearest_values(self, scaled: Tensor) -> Tensor:
        """The value nearest to each of `scaled`, float32 [rows, groups, group_size] or any shape for a codebook.

        Codebooks by a table of `FINE` places, which is several times faster.
        """
        if self.sorted is None:
            return self.codes(scaled) - self.zeros
        if self.table is None:
            self.low = float(self.sorted[0])
            self.fine = (FINE - 1) / max(float(self.sorted[-1]) - self.low, 1e-12)
            self.table = self.sorted[self.codes((torch.arange(FINE) + 0.5) / self.fine + self.low)]
        places = (scaled - self.low).mul_(self.fine).clamp_(0, FINE - 1)
        return self.table[places.to(torch.int32)]

    def inside(self, scaled: Tensor, codes: Tensor) -> Tensor:
        """`scaled` [rows, groups, group_size], each moved into the cell of its code: what rounds to it, less a margin.

        `codes` [rows, groups, group_size] are indices in sorted order.
        """
        if self.sorted is not None:
            borders, far = midpoints(self.sorted), torch.tensor([torch.inf])
            slack = INSIDE * (self.sorted[1:] - self.sorted[:-1])
            low, high = torch.cat([-far, borders + slack]), torch.cat([borders - slack, far])
            return torch.minimum(torch.maximum(scaled, low[codes.long()]), high[codes.long()])
        low, high = codes - 0.5 + INSIDE, codes + 0.5 - INSIDE
        low = torch.where(codes == 0, -torch.inf, low) - self.zeros
        high = torch.where(codes == self.levels - 1, torch.inf, high) - self.zeros
        return torch.minimum(torch.maximum(scaled, low), high)


class LatentPart:
    """One part: `latent` float32 [rows, columns] and `change` float32 [rows, groups] (log of the scale's change)."""

    def __init__(self, part: RowGroup, parent: Tensor) -> None:
        self.part, self.grid = part, LatentGrid(part)
        self.scale = (part.factors.float()[:, None] * part.scales.float()).clamp_min(1e-12)
        codes = part.codes if self.grid.order is None else self.grid.order.argsort()[part.codes.long()]
        padded = nn.functional.pad(codes.float(), (0, self.scale.shape[1] * self.grid.size - codes.shape[1]))
        inside = self.grid.inside(self.grid.scaled(parent, self.scale), padded.view(len(codes), -1, self.grid.size))
        latent = (inside * self.scale[:, :, None]).flatten(1)[:, : parent.shape[1]]
        self.latent = nn.Parameter(latent.contiguous())
        self.change = nn.Parameter(torch.zeros_like(self.scale))

    def spacing(self) -> float:
        """The mean distance between two neighbours of the grid, in the unit of the weights."""
        steps = 1.0 if self.grid.sorted is None else float(self.grid.sorted.diff().mean())
        return steps * float(self.scale.mean())

    @torch.no_grad()
    def packed(self) -> RowGroup:
        """The part as it is now, with scales of 8 bits again."""
        scales = self.scale * self.change.exp()
        # old factors while they reach, so that scales which did not move stay; codes are those that were trained
        kept = scales.amax(1) <= SCALE_LEVELS * self.part.factors.float()
        factors = torch.where(kept, self.part.factors, row_factors(scales))
        codes_of_scale = split_scales(scales, factors)
        codes = self.grid.codes(self.grid.scaled(self.latent, scales))
        if self.grid.order is not None:
            codes = self.grid.order[codes.long()]
        flat = codes.to(torch.uint8).flatten(1)[:, : self.latent.shape[1]].contiguous()
        return RowGroup(self.part.format, flat, codes_of_scale, factors, self.part.zeros, self.part.codebook)


class LatentTensor:
    """A packed weight that can be trained."""

    def __init__(self, tensor: PackedTensor, parent: Tensor) -> None:
        self.shape, self.row_part, self.inputs = tensor.shape, tensor.row_part, tensor.inputs
        matrix = as_matrix(parent, self.inputs)
        self.parts = []
        for index, part in enumerate(tensor.in_tiles):
            rows = slice(None) if tensor.row_part is None else tensor.row_part == index
            self.parts.append(LatentPart(part, matrix[rows]))

    def value(self) -> Tensor:
        """The weight as the network uses it, float32 [rows, …] or whatever its `shape`, differentiable in the parts."""
        values = [Rounded.apply(part.latent, part.change, part.scale, part.grid) for part in self.parts]
        if self.row_part is None:
            return from_matrix(values[0], self.shape, self.inputs)  # type: ignore[arg-type]
        matrix = torch.cat(values)[self.row_part.argsort(stable=True).argsort()]
        return from_matrix(matrix, self.shape, self.inputs)

    def packed(self) -> PackedTensor:
        """The weight [rows, …] as it is now, packed."""
        return PackedTensor(self.shape, [part.packed() for part in self.parts], self.row_part, self.inputs)
