"""Choosing grids: the scale of each group and the codebook of each tensor.

A group of weights w with importances d is approximated by s · c[q]. For a given codebook c, the scale that minimises
sum d (w - s c[q])² is found by trying shrunken versions of the largest magnitude, then alternating nearest codes and
the least-squares scale s = sum d w c[q] / sum d c[q]². The codebook itself is learned by the same alternation over all
groups of the tensor: Lloyd's algorithm (Lloyd, Least squares quantization in PCM, 1982) with weights d s².
A uniform grid is w ≈ s (q - z) with an integer zero point z, found by trying shrunken ranges. Where another tool must
hold the values too (symmetric values), s is a whole multiple of the row's factor, a power of two, before it is tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gulliver.runtime.compiled import native
from gulliver.runtime.formats import Format

SHRINKS = tuple(1.0 - 0.08 * step for step in range(7))
SCALE_LEVELS = 255
FACTOR_HEADROOM = 1.1
CODEBOOK_SAMPLE = 1024


@dataclass
class Grid:
    """The grid of n groups: `scales` and `zeros` float32 [n] or [rows, groups]; `zeros` is None with a codebook."""

    scales: Tensor
    zeros: Tensor | None


def nearest(values: Tensor, midpoints: Tensor) -> Tensor:
    """Index of the nearest of sorted entries for values of any shape, int32; `midpoints` [levels - 1] between them."""
    return torch.bucketize(values.contiguous(), midpoints, out_int32=True)


def midpoints(codebook: Tensor) -> Tensor:
    """Decision borders between sorted codebook entries, float32 [levels - 1]."""
    entries = codebook.float()
    return (entries[1:] + entries[:-1]) / 2


class Lookup:
    """A sorted codebook [levels] as a table of places: what is nearest is read off, an order faster than searched.

    Exact for a codebook of integers, whose borders are multiples of 1/2; else right but for values within 1/4096 of a
    border.
    """

    def __init__(self, codebook: Tensor) -> None:
        self.codebook, entries = codebook, codebook.float()
        self.top = entries.abs().max()
        self.fine = 2.0 if torch.equal(entries, entries.round()) else 4096.0
        self.reach = float(torch.ceil(self.top * self.fine))
        places = torch.arange(-self.reach, self.reach + 1) / self.fine
        codes = nearest(places, midpoints(codebook))
        self.codes, self.entries = codes.to(torch.uint8), entries[codes]

    @property
    def table(self) -> tuple[Any, Any, float]:
        """What native code takes: uint8 codes and float32 entries of each place, and places in a unit."""
        return self.codes.numpy(), self.entries.numpy(), self.fine

    def places(self, scaled: Tensor) -> Tensor:
        """Where `codes` and `entries` [places] have what is nearest to each of `scaled`, values of any shape in units

        of the scale, not-a-number where the lowest is; int32, flat.
        """
        found = (scaled * self.fine).ceil_().clamp_(-self.reach, self.reach).nan_to_num_(-self.reach)
        return found.add_(self.reach).to(torch.int32).flatten()


def fit_codebook_grid(groups: Tensor, importance: Tensor, codebook: Lookup, refine: int = 2) -> Grid:
    """Scales [n] that fit groups [n, g] with importance [n or 1, g] on a sorted codebook [levels]."""
    groups = groups.contiguous()
    if native is not None:
        scales = torch.empty(len(groups))
        native.fit_scales(
            "auto",
            groups.numpy(),
            importance.contiguous().numpy(),
            table=codebook.table,
            top=float(codebook.top),
            shrinks=SHRINKS,
            refine=refine,
            scales=scales.numpy(),
        )
        return Grid(scales, None)
    peak = groups.abs().amax(1).clamp_min(1e-12)
    best_scale, best_error = peak / codebook.top, torch.full_like(peak, torch.inf)
    for shrink in SHRINKS:
        scale = peak * (shrink / codebook.top)
        entries = codebook.entries.index_select(0, codebook.places(groups / scale[:, None])).view_as(groups)
        values = entries.mul_(scale[:, None])
        error = values.sub_(groups).square_().mul_(importance).sum(1)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    for _ in range(refine):
        entries = codebook.entries.index_select(0, codebook.places(groups / best_scale[:, None])).view_as(groups)
        weighted = importance * entries
        solved = (weighted * groups).sum(1) / weighted.mul_(entries).sum(1).clamp_min(1e-20)
        best_scale = torch.where(solved > 0, solved, best_scale)
    return Grid(best_scale, None)


def fit_uniform_grid(groups: Tensor, importance: Tensor, levels: int) -> Grid:
    """Scale and integer zero point [n] that fit groups [n, g] with importance [n or 1, g]."""
    low, high = groups.amin(1).clamp_max(0.0), groups.amax(1).clamp_min(0.0)
    width = (high - low).clamp_min(1e-12)
    best_scale, best_zero = width / (levels - 1), torch.zeros_like(width)
    best_error = torch.full_like(width, torch.inf)
    for shrink in SHRINKS:
        scale = width * (shrink / (levels - 1))
        zero = torch.round(-low * shrink / scale).clamp_(0, levels - 1)
        codes = torch.round(groups / scale[:, None] + zero[:, None]).clamp_(0, levels - 1)
        error = (((codes - zero[:, None]) * scale[:, None] - groups) ** 2 * importance).sum(1)
        better = error < best_error
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    return Grid(best_scale, best_zero)


def fit_symmetric_grid(groups: Tensor, importance: Tensor, fmt: Format, factors: Tensor) -> Grid:
    """Scales [n], whole multiples of the power-of-two `factors` [n], and zero points in the middle of the codes, that

    fit groups [n, g] with importance [n or 1, g].
    """
    middle, factors = fmt.levels / 2, factors.float()
    width = torch.maximum(groups.amax(1) / (middle - 1), -groups.amin(1) / middle).clamp_min(1e-12)
    best, best_scale = torch.full_like(width, torch.inf), factors
    tried = torch.ceil(width / factors) * factors
    for shrink in (*SHRINKS, None, None):  # the last two are the least-squares scales of what was tried before
        scale = (tried / factors).round().clamp_(1, fmt.top_scale) * factors
        levels = torch.round(groups / scale[:, None]).clamp_(-middle, middle - 1)
        error = ((levels * scale[:, None] - groups) ** 2 * importance).sum(1)
        best_scale, best = torch.where(error < best, scale, best_scale), torch.minimum(error, best)
        weighted = importance * levels
        solved = (weighted * groups).sum(1) / (weighted * levels).sum(1).clamp_min(1e-20)
        tried = solved if shrink is None else width * shrink
    return Grid(best_scale, torch.full_like(width, middle))


def learn_codebook(groups: Tensor, importance: Tensor, levels: int, rounds: int = 6, seed: int = 0) -> Tensor:
    """A sorted int8 codebook [levels] with largest magnitude 127 that fits groups [n, g]; importance [n or 1, g].

    Works on a sample of at most `CODEBOOK_SAMPLE` groups; starts from normal quantiles.
    """
    if len(groups) > CODEBOOK_SAMPLE:
        pick = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))[:CODEBOOK_SAMPLE]
        groups = groups[pick]
        importance = importance[pick] if len(importance) > 1 else importance
    quantiles = (torch.arange(levels) + 0.5) / levels
    codebook = torch.special.ndtri(quantiles)
    codebook = codebook / codebook.abs().max()
    flat_importance = importance.expand_as(groups)
    for _ in range(rounds):
        lookup = Lookup(codebook)
        scales = fit_codebook_grid(groups, importance, lookup, refine=1).scales
        codes = lookup.codes.index_select(0, lookup.places(groups / scales[:, None])).long()
        weight = (flat_importance * scales[:, None] ** 2).flatten()
        total = torch.zeros(levels).index_add_(0, codes, weight)
        moment = torch.zeros(levels).index_add_(0, codes, weight * (groups / scales[:, None]).flatten())
        codebook = torch.where(total > 0, moment / total.clamp_min(1e-20), codebook).sort().values
        codebook = codebook / codebook.abs().max().clamp_min(1e-12)
    return torch.round(codebook * 127).to(torch.int8)


def split_scales(scales: Tensor, factors: Tensor) -> Tensor:
    """Group scales [rows, groups] as uint8 multiples of the row factors [rows]; a used group never gets scale 0."""
    return torch.round(scales / factors.float()[:, None]).clamp_(1, SCALE_LEVELS).to(torch.uint8)


def row_factors(scales: Tensor) -> Tensor:
    """bfloat16 row factors [rows] so that the largest group scale of each row has a code below 255."""
    largest = scales.amax(1).clamp_min(1e-30)
    return (largest * (FACTOR_HEADROOM / SCALE_LEVELS)).to(torch.bfloat16)


def power_factors(scales: Tensor, fmt: Format) -> Tensor:
    """bfloat16 row factors [rows], powers of two, so that the largest group scale of each row has a code.

    They are 2^-24 to 16, so that every scale, and every value, is a float16 number.
    """
    wanted = scales.amax(1) * (FACTOR_HEADROOM / fmt.top_scale)
    return torch.exp2(torch.log2(wanted.clamp_min(1e-30)).ceil_().clamp_(-24, 4)).to(torch.bfloat16)


def as_groups(weight: Tensor, fmt: Format) -> Tensor:
    """[rows, columns] -> [rows, groups, group_size], padded with zeros."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, fmt.groups(columns) * fmt.group_size - columns))
    return padded.view(rows, -1, fmt.group_size)
