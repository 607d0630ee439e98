"""What `calibrate` leaves behind and later steps read: second moments of inputs, and how much outputs matter.

For a weight W [rows, columns] of a module that maps x to W x, let H = E[x xᵀ] over calibration positions and
r_i = E[g_i²], with g the gradient of the loss at the module's output. Replacing W by W + Δ moves the model's output
distribution by a divergence of about

    loss increase = 1/2 · Σ_i r_i · Δ_i H Δ_iᵀ

(second order; the Fisher information with input and output taken as independent, its output side as diagonal: Martens
and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015, arXiv 1503.05671). A lookup
table has the roles swapped: r_v is how often row v is looked up, H the diagonal of the output's squared gradient. A
weight that several modules share (an embedding that is also the head) has one such pair for each *use*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.core.records import StatisticsTable, WeightRow
from gulliver.core.store.artifact import Artifact
from gulliver.nets.weights import all_finite
from gulliver.runtime.blocks import BlockRows
from gulliver.runtime.packed import RowGroup

CHUNK_ROWS = 4096
RUN_ROWS, MOST_RUNS = 64, 16
"""Rows of one run on which an error is looked at, and runs that are looked at, about."""
ROWS = "rows.safetensors"
"""The file of all row weights, and of the moments of lookup tables."""


@dataclass(frozen=True)
class Use:
    """One use of a weight: `moment` is H [columns, columns] or its diagonal [columns], `rows` is r [rows]."""

    moment: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Joint:
    """One H for all uses of a weight, and what GPTQ leaves of an error: `moment` [columns, columns], `left` [columns]

    (see `left_by_feedback`).
    """

    moment: Tensor
    left: Tensor


@dataclass(frozen=True)
class Statistics:
    """The report of `calibrate`, opened; tensors are read when asked for."""

    artifact: Artifact
    table: StatisticsTable

    @property
    def weights(self) -> Mapping[str, WeightRow]:
        """Every weight that may be packed, by name."""
        return self.table.weights

    def uses(self, name: str, matrix: int = 0) -> list[Use]:
        """The uses of a weight, or of one matrix of a stack, read from disk now.

        ArtifactError for a weight that was not calibrated.
        """
        if name not in self.weights:
            raise ArtifactError(f"calibration {self.artifact.id[:12]} knows no weight {name!r}; calibrate this model")
        row = self.weights[name]
        found = row.uses if row.matrices == 1 else row.uses[matrix : matrix + 1]
        return [Use(self._tensor(file, moment), self._tensor(ROWS, rows)) for file, moment, rows in found]

    def _tensor(self, file: str, key: str) -> Tensor:
        try:
            with safe_open(self.artifact.file(file), framework="pt") as opened:
                tensor = opened.get_tensor(key).clone()
        except SafetensorError as error:
            raise ArtifactError(f"{file} of calibration {self.artifact.id[:12]} is damaged: {error}") from error
        if not all_finite(tensor):
            raise ArtifactError(f"{file} of calibration {self.artifact.id[:12]}: {key} is not finite; calibrate again")
        return tensor


def joint_moment(uses: list[Use]) -> Tensor:
    """One H for all uses: their moments weighted by their mean row weight. [columns, columns], or [c]."""
    assert uses, "a weight has at least one use"
    if len(uses) == 1:
        return uses[0].moment
    parts = [use.moment * float(use.rows.mean()) for use in uses]
    full = next((part for part in parts if part.dim() == 2), None)
    if full is None:
        return torch.stack(parts).sum(0)
    for part in parts:
        if part is not full:
            (full if part.dim() == 2 else full.diagonal()).add_(part)
    return full


def loss_increase(weight: Tensor, part: RowGroup | BlockRows, uses: list[Use]) -> float:
    """What storing `weight` [n, columns] as `part` is predicted to add to the loss, in the unit of the statistics.

    Of many rows some runs are looked at, and tell what share of what rows send out is lost (see `likely_increase`).
    """
    count = -(-len(weight) // RUN_ROWS)
    looked_at = range(0, count, max(1, count // MOST_RUNS))
    lost, sent = [0.0] * len(uses), [0.0] * len(uses)
    for run in looked_at:
        start, stop = run * RUN_ROWS, min((run + 1) * RUN_ROWS, len(weight))
        some = weight[start:stop].float()
        delta = part.rows(start, stop).dequantize() - some
        for place, use in enumerate(uses):
            lost[place] += float((use.rows[start:stop] * _energy(delta, use.moment)).sum())
            sent[place] += float((use.rows[start:stop] * (some.square() @ _diagonal(use))).sum())
    if len(looked_at) == count:
        return 0.5 * sum(lost)
    shares = [one / max(part, 1e-30) for one, part in zip(lost, sent, strict=True)]
    return 0.5 * sum(share * whole for share, whole in zip(shares, energies(weight, uses), strict=True))


def energies(weight: Tensor, uses: list[Use], rows: Tensor | None = None) -> list[float]:
    """What rows of `weight` [rows, columns] send out in each use, in the unit of the loss: Σ_i r_i Σ_j W_ij² H_jj.

    `rows`, int64 [n], says which; None when they are all.
    """
    found = [0.0] * len(uses)
    for which in (torch.arange(len(weight)) if rows is None else rows).split(CHUNK_ROWS):
        squares = weight[which].float().square()
        for place, use in enumerate(uses):
            found[place] += float((use.rows[which] * (squares @ _diagonal(use))).sum())
    return found


def likely_increase(
    some: Tensor, part: RowGroup | BlockRows, uses: list[Use], energies: list[float], joint: Joint | None = None
) -> float:
    """The loss increase of rows of which `some` [n, columns] are stored as `part`, in the unit of the statistics.

    Of what all rows send out (`energies`) the same share is lost as of these. How much rows matter differs by orders of
    magnitude, the share hardly at all: a few rows tell it. With `joint` of the uses, `part` being rounded to nearest,
    what GPTQ will leave of it.
    """
    some, total = some.float(), 0.0
    delta = part.rows(0, len(some)).dequantize() - some
    for use, sent in zip(uses, energies, strict=True):
        lost = _energy(delta, use.moment).sum()
        total += 0.5 * sent * float(lost / (some.square() @ _diagonal(use)).sum().clamp_min(1e-30))
    if joint is not None:
        left = (delta.square() @ joint.left).sum() / _energy(delta, joint.moment).sum().clamp_min(1e-30)
        total *= min(1.0, float(left))
    return total


def _energy(delta: Tensor, moment: Tensor) -> Tensor:
    """What each row of `delta` [n, columns] sends out, with H [columns, columns] or its diagonal: float32 [n]."""
    return torch.linalg.vecdot(delta @ moment, delta) if moment.dim() == 2 else delta.square() @ moment


def _diagonal(use: Use) -> Tensor:
    return use.moment.diagonal() if use.moment.dim() == 2 else use.moment


def open_statistics(calibration: Artifact, model: Artifact) -> Statistics:
    """The statistics in a report of `calibrate`. ArtifactError when it is another report or of another model."""
    table = StatisticsTable.of(calibration)
    if table.model != model.id:
        told = f"calibration {calibration.id[:12]} is of model {table.model[:12]}, not of {model.id[:12]}"
        raise ArtifactError(f"{told}; run `gulliver calibrate` on this model")
    return Statistics(calibration, table)
