"""What `calibrate` leaves behind and later steps read: second moments of inputs, and how much outputs matter.

For a weight W [rows, columns] of a module that maps x to W x, let H = E[x xᵀ] over calibration positions and
r_i = E[g_i²], with g the gradient of the loss at the module's output. Replacing W by W + Δ moves the model's output
distribution by a divergence of about

    damage = 1/2 · Σ_i r_i · Δ_i H Δ_iᵀ

(second order; the Fisher information with input and output taken as independent, its output side as diagonal: Martens
and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015, arXiv 1503.05671). A lookup
table has the roles swapped: r_v is how often row v is looked up, H the diagonal of the output's squared gradient. A
weight that several modules share (an embedding that is also the head) has one such *view* for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.core.store.artifact import Artifact
from gulliver.runtime.packed import RowGroup

STATISTICS = "statistics.json"
CHUNK_ROWS = 4096
ROWS = "rows.safetensors"
"""The file of all row weights, and of the moments of lookup tables."""
FORMAT = 1


@dataclass(frozen=True)
class View:
    """One use of a weight: `moment` is H [columns, columns] or its diagonal [columns], `rows` is r [rows]."""

    moment: Tensor
    rows: Tensor


@dataclass(frozen=True)
class WeightRow:
    """One packable weight: its shape [rows, …], its block, and (file, moment key, rows key) of each view."""

    name: str
    shape: tuple[int, ...]
    block: str
    views: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Statistics:
    """The report of `calibrate`, opened; tensors are read when asked for. `blocks` are in the network's order."""

    artifact: Artifact
    model_id: str
    weights: Mapping[str, WeightRow]
    blocks: tuple[str, ...]
    sensitivity: str

    def views(self, name: str) -> list[View]:
        """The views of a weight, read from disk now."""
        return [View(self._tensor(file, moment), self._tensor(ROWS, rows)) for file, moment, rows in self._row(name)]

    def _row(self, name: str) -> tuple[tuple[str, str, str], ...]:
        if name not in self.weights:
            raise ArtifactError(f"calibration {self.artifact.id[:12]} knows no weight {name!r}; calibrate this model")
        return self.weights[name].views

    def _tensor(self, file: str, key: str) -> Tensor:
        try:
            with safe_open(self.artifact.file(file), framework="pt") as opened:
                tensor = opened.get_tensor(key).clone()
        except SafetensorError as error:
            raise ArtifactError(f"{file} of calibration {self.artifact.id[:12]} is damaged: {error}") from error
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{file} of calibration {self.artifact.id[:12]}: {key} is not finite; calibrate again")
        return tensor


def feedback_moment(views: list[View]) -> Tensor:
    """One H for error feedback: the views' moments weighted by their mean row weight. [columns, columns], or [c]."""
    assert views, "a weight has at least one view"
    if len(views) == 1:
        return views[0].moment
    parts = [view.moment * float(view.rows.mean()) for view in views]
    full = next((part for part in parts if part.dim() == 2), None)
    if full is None:
        return torch.stack(parts).sum(0)
    for part in parts:
        if part is not full:
            (full if part.dim() == 2 else full.diagonal()).add_(part)
    return full


def damage(weight: Tensor, part: RowGroup, views: list[View], rows: Tensor | None = None) -> float:
    """Damage of `weight` [n, columns] stored as `part`; `rows` says which rows of the whole weight these are."""
    total = 0.0
    for start in range(0, len(weight), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(weight))
        delta = part.rows(start, stop).dequantize() - weight[start:stop].float()
        which = slice(start, stop) if rows is None else rows[start:stop]
        for view in views:
            if view.moment.dim() == 2:
                energy = torch.linalg.vecdot(delta @ view.moment, delta)
            else:
                energy = delta.square() @ view.moment
            total += 0.5 * float((view.rows[which] * energy).sum())
    return total


def open_statistics(calibration: Artifact, model: Artifact) -> Statistics:
    """The statistics in a report of `calibrate`. ArtifactError when it is no such report, or of another model."""
    try:
        body = json.loads(calibration.file(STATISTICS).read_text(encoding="utf-8"))
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {body['format']!r}, this version reads {FORMAT}")
        weights = {
            name: WeightRow(name, tuple(row["shape"]), row["block"], tuple(tuple(view) for view in row["views"]))
            for name, row in body["weights"].items()
        }
        statistics = Statistics(calibration, body["model"], weights, tuple(body["blocks"]), body["sensitivity"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{STATISTICS} of {calibration.id[:12]} is damaged: {error!r}; calibrate again") from error
    if statistics.model_id != model.id:
        told = f"calibration {calibration.id[:12]} is of model {statistics.model_id[:12]}, not of {model.id[:12]}"
        raise ArtifactError(f"{told}; run `gulliver calibrate` on this model")
    return statistics


def statistics_json(model_id: str, weights: Mapping[str, WeightRow], facts: Mapping[str, Any]) -> str:
    """The text of statistics.json."""
    rows = {
        name: {"shape": list(row.shape), "block": row.block, "views": [list(view) for view in row.views]}
        for name, row in weights.items()
    }
    body = {"format": FORMAT, "model": model_id, "weights": rows, **facts}
    return json.dumps(body, sort_keys=True, indent=1) + "\n"
