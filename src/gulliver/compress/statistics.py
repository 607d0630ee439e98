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

from gulliver.core.artifact import Artifact
from gulliver.core.errors import ArtifactError

STATISTICS = "statistics.json"
CALIBRATION = "calibration.json"
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
    """The report of `calibrate`, opened; tensors are read when asked for."""

    artifact: Artifact
    model_id: str
    weights: Mapping[str, WeightRow]
    sensitivity: str

    def views(self, name: str) -> list[View]:
        """The views of a weight, read from disk now."""
        return [View(self._tensor(file, moment), self._tensor(ROWS, rows)) for file, moment, rows in self._row(name)]

    def moment(self, name: str) -> Tensor:
        """One H for error feedback: the views' moments weighted by their mean row weight. [c, c], or [c]."""
        total: Tensor | None = None
        for view in self.views(name):
            part = view.moment * float(view.rows.mean())
            if total is None:
                total = part
            elif part.dim() == 1 and total.dim() == 2:
                total.diagonal().add_(part)
            elif part.dim() == 2 and total.dim() == 1:
                total, part = part, total
                total.diagonal().add_(part)
            else:
                total = total + part
        assert total is not None, f"{name} has no view"
        return total

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


def damage(weight: Tensor, approximation: Tensor, views: list[View], rows: Tensor | slice = slice(None)) -> Tensor:
    """Damage of each row of `weight` [n, columns] replaced by `approximation`; `rows` says which rows these are."""
    delta = approximation - weight
    total = torch.zeros(len(weight))
    for view in views:
        if view.moment.dim() == 2:
            energy = torch.linalg.vecdot(delta @ view.moment, delta)
        else:
            energy = delta.square() @ view.moment
        total += 0.5 * view.rows[rows] * energy
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
        statistics = Statistics(calibration, body["model"], weights, body["sensitivity"])
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
