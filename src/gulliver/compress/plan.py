"""Step `plan`: one format per weight, chosen so that the predicted damage is least within a budget of bytes.

A multiple-choice knapsack. Items are weights, and, where rows of a lookup table matter very differently (frequent and
rare tokens), classes of its rows in order of importance; choices are formats. With b bytes, D damage and x in {0, 1}:

    minimise  Σ D[i, f] x[i, f]    subject to  Σ b[i, f] x[i, f] <= budget,   Σ_f x[i, f] = 1 for every item i

solved exactly by HiGHS (Huangfu and Hall, Parallelizing the dual revised simplex method, 2018). D is measured on a
sample of each weight's rows in one reference format, with error feedback as `quantize` does it, and carried over to
the other formats by ratios measured on a few weights: how errors fall with bits hardly depends on the weight, how much
they cost does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix
from torch import Tensor

from gulliver.compress.feedback import quantize_matrix
from gulliver.compress.options import PlanOptions
from gulliver.compress.sizes import overhead_bytes, packed_overhead_bytes
from gulliver.compress.statistics import Statistics, View, damage, feedback_moment, open_statistics
from gulliver.compress.threads import each, workers
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, BudgetError, ConfigError
from gulliver.core.stdout import stdout_into
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import write_atomic
from gulliver.nets.weights import canonical_names, read_safetensors
from gulliver.runtime.formats import CODEBOOK_BITS, GROUP_SIZES, PLANES, TILE_ROWS, Format
from gulliver.tasks import get_task

PLAN = "plan.json"
REFERENCE = Format(4, 64, "codebook")
PROBES = 8
CLASSES = (1 / 24, 1 / 8, 1 / 3, 1.0)
"""Cumulative shares of a lookup table's rows, most important first, that may get formats of their own."""
MIN_CLASS_ROWS = 64
FRONTIER_POINTS = 12
GAP = 1e-4


@dataclass(frozen=True)
class Measured:
    """A class of rows of a weight: its damage in the reference format, and each format's damage divided by that."""

    name: str
    rows: int
    columns: int
    damage: float
    ratios: list[float]


@dataclass(frozen=True)
class Item:
    """Something that gets one format: `rows` of a weight, with a damage for each format of the menu."""

    name: str
    rows: int
    columns: int
    damages: tuple[float, ...]

    def bytes(self, fmt: Format) -> int:
        """Bytes in the weight files, the header's entries included."""
        return fmt.packed_bytes(self.rows, self.columns) + packed_overhead_bytes(self.name, fmt)


@dataclass(frozen=True)
class Choice:
    """What a weight is stored in: (rows, format) of each part, most important rows first."""

    parts: tuple[tuple[int, Format], ...]


def run(cfg: PlanOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """A report with plan.json. BudgetError, with the smallest size that is feasible, when the budget is too small."""
    model, calibration = inputs["model"], inputs["calibration"]
    statistics = open_statistics(calibration, model)
    formats = menu(cfg.kind, cfg.min_bits)
    job, measured = measurer(model, statistics, formats, cfg), []
    with ctx.progress.stage("plan", total=len(statistics.weights), unit="weight") as bar:
        for rows in each(job, sorted(statistics.weights), workers(ctx)):
            measured.extend(rows)
            bar.advance(note=rows[0].name)
    items = items_of(measured, formats)
    fixed = overhead_bytes(model, set(statistics.weights)) + row_lists(items)
    smallest = fixed + sum(min(item.bytes(fmt) for fmt in formats) for item in items)
    chosen = solve(items, formats, cfg.size_bytes - fixed)
    if chosen is None:
        raise BudgetError(
            f"{cfg.size_bytes:,} bytes are too few: this model needs at least {smallest:,} ({smallest / 1e6:.1f} MB)",
            {"size_bytes": smallest},
        )
    body = plan_json(items, formats, chosen, statistics, cfg, fixed)
    parents = [model.id, calibration.id]
    with ctx.writer(kind="report", task=model.task, parents=parents, step_name="plan", config=cfg) as writer:
        write_atomic(writer.path / PLAN, json.dumps(body, sort_keys=True, indent=1) + "\n")
        return writer.commit()


def menu(kind: str, min_bits: int) -> list[Format]:
    """All formats of a kind with at least `min_bits`, by falling bits; codebooks end at 6 bits, 8 is uniform."""
    kinds = ("codebook", "uniform") if kind == "any" else (kind,)
    found = [Format(bits, size, one) for one in kinds for bits in PLANES for size in GROUP_SIZES if bits >= min_bits
             and not (one == "codebook" and bits not in CODEBOOK_BITS)
             and not (kind == "any" and one == "uniform" and bits in CODEBOOK_BITS)]  # fmt: skip
    return sorted(found, key=lambda fmt: -fmt.packed_bytes(TILE_ROWS, 128 * 64))


# ---- what each choice costs -----------------------------------------------------------------------------------------
def measurer(
    model: Artifact, statistics: Statistics, formats: Sequence[Format], cfg: PlanOptions
) -> Callable[[str], list[Measured]]:
    """A function from a weight's name to what was measured of each class of its rows; thread-safe."""
    empty = get_task(model.task).load(model.path, empty=True)
    canonical = canonical_names(empty)
    names = sorted(statistics.weights)
    probes = set(names[:: max(1, len(names) // PROBES)])

    def job(name: str) -> list[Measured]:
        matrix, views = read_weight(model.path, name, canonical).flatten(1), statistics.views(name)
        moment, measured = feedback_moment(views), []
        for rows in row_classes(views, matrix):
            some, scale = sampled(rows, cfg.probe_rows)
            found: list[float] = []
            for fmt in [REFERENCE, *(formats if name in probes else [])]:
                part = quantize_matrix(matrix[some], fmt, moment, feedback=cfg.feedback)
                found.append(damage(matrix[some], part, views, some))
            base, others = found[0], found[1:]
            ratios = [one / base for one in others] if base > 0 else []
            measured.append(Measured(name, len(rows), matrix.shape[1], scale * base, ratios))
        return measured

    return job


def items_of(measured: Sequence[Measured], formats: Sequence[Format]) -> list[Item]:
    """Items with a damage for every format: that in the reference format, times the typical ratio of the other."""
    table = np.array([row.ratios for row in measured if row.ratios])
    typical = np.exp(np.mean(np.log(np.maximum(table, 1e-12)), 0)) if len(table) else np.ones(len(formats))
    return [
        Item(row.name, row.rows, row.columns, tuple(float(row.damage * one) for one in typical)) for row in measured
    ]


def read_weight(folder: Path, name: str, canonical: Mapping[str, str]) -> Tensor:
    """One weight of a plain folder, as stored, under whichever of its names it stands."""
    for _, tensor in read_safetensors(folder, only=lambda stored: canonical.get(stored) == name):
        return tensor
    raise ConfigError(f"{folder} holds no weights for {name}; compress a plain model as `gulliver pull` makes it")


def row_lists(items: Sequence[Item]) -> int:
    """Bytes of the lists that say which rows are in which part: one a row where a weight may have several parts."""
    names = [item.name for item in items]
    return sum(item.rows for item in items if names.count(item.name) > 1)


def sampled(rows: Tensor, count: int) -> tuple[Tensor, float]:
    """At most `count` of the rows, evenly spread, and how many rows each stands for."""
    step = max(1, len(rows) // count)
    some = rows[::step][:count]
    return some, len(rows) / len(some)


def importance(views: list[View], matrix: Tensor) -> Tensor:
    """How much each row matters: its weight in every view times the energy it sends out there, float32 [rows]."""
    total = torch.zeros(len(matrix))
    for view in views:
        diagonal = view.moment.diagonal() if view.moment.dim() == 2 else view.moment
        total += view.rows * float(diagonal.mean())
    return total


def row_classes(views: list[View], matrix: Tensor) -> list[Tensor]:
    """The row sets that may get formats of their own: several for a lookup table, all rows in one for others."""
    table = any(view.moment.dim() == 1 for view in views) and len(matrix) * CLASSES[0] >= MIN_CLASS_ROWS
    counts, before = [], 0
    for share in CLASSES if table else (1.0,):
        stop = len(matrix) if share == 1.0 else int(share * len(matrix)) // TILE_ROWS * TILE_ROWS
        counts.append(stop - before)
        before = stop
    return rows_of_classes(views, matrix, counts)


def rows_of_classes(views: list[View], matrix: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Rows by falling importance, cut into classes of `counts` rows; int64, ascending within a class."""
    if len(counts) == 1:
        return [torch.arange(len(matrix))]
    order = importance(views, matrix).argsort(descending=True, stable=True)
    return [part.sort().values for part in order.split(list(counts))]


# ---- choosing -------------------------------------------------------------------------------------------------------
def solve(items: Sequence[Item], formats: Sequence[Format], budget_bytes: int) -> list[int] | None:
    """The index of each item's format, or None when even the smallest formats are too large."""
    sizes = np.array([[item.bytes(fmt) for fmt in formats] for item in items], dtype=np.float64)
    if sizes.min(1).sum() > budget_bytes:
        return None
    count, width = sizes.shape
    rows = np.repeat(np.arange(count), width)
    one_each = csr_matrix((np.ones(count * width), (rows, np.arange(count * width))))
    damages = np.array([item.damages for item in items]).ravel()
    scale = damages.sum() / len(damages) or 1.0
    with open(os.devnull, "wb") as nowhere, stdout_into(nowhere.fileno()):  # HiGHS chatters past Python
        found = milp(
            damages / scale,
            constraints=[
                LinearConstraint(csr_matrix(sizes.ravel()[None] / 1e6), -np.inf, budget_bytes / 1e6),
                LinearConstraint(one_each, 1, 1),
            ],
            integrality=np.ones(count * width),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "time_limit": 30.0},
        )
    assert found.x is not None, f"HiGHS found no plan within {budget_bytes} bytes: {found.message}"
    chosen = found.x.reshape(count, width).argmax(1)
    assert sizes[np.arange(count), chosen].sum() <= budget_bytes + 1, "the solver's plan is larger than the budget"
    return [int(index) for index in chosen]


def plan_json(
    items: Sequence[Item],
    formats: Sequence[Format],
    chosen: Sequence[int],
    statistics: Statistics,
    cfg: PlanOptions,
    fixed: int,
) -> dict[str, Any]:
    """What stands in plan.json; damages are in the unit of the statistics."""
    places = {name: place for place, name in enumerate(statistics.blocks)}
    tensors: dict[str, dict[str, Any]] = {}
    blocks = {row.block: 0.0 for row in sorted(statistics.weights.values(), key=lambda row: places[row.block])}
    for item, index in zip(items, chosen, strict=True):
        fmt, row = formats[index], statistics.weights[item.name]
        entry = tensors.setdefault(item.name, {"name": item.name, "shape": list(row.shape), "bytes": 0, "parts": []})
        size, hurt = fmt.packed_bytes(item.rows, item.columns), item.damages[index]
        last = entry["parts"][-1] if entry["parts"] else None
        if last is None or last["format"] != fmt.name:
            last = {"rows": 0, "format": fmt.name, "bytes": 0, "damage": 0.0}
            entry["parts"].append(last)
        last["rows"], last["bytes"], last["damage"] = (
            last["rows"] + item.rows,
            last["bytes"] + size,
            last["damage"] + hurt,
        )
        entry["bytes"] += size
        blocks[row.block] += hurt
    for entry in tensors.values():
        for part in entry["parts"]:
            part["bits_per_weight"] = 8 * part["bytes"] / (part["rows"] * int(np.prod(entry["shape"][1:])))
    return {
        "budget_bytes": cfg.size_bytes,
        "size_bytes": fixed + sum(item.bytes(formats[index]) for item, index in zip(items, chosen, strict=True)),
        "damage": sum(item.damages[index] for item, index in zip(items, chosen, strict=True)),
        "tensors": list(tensors.values()),
        "blocks": [{"name": name, "damage": hurt} for name, hurt in blocks.items()],
        "menu": frontier(items, formats, fixed),
    }


def frontier(items: Sequence[Item], formats: Sequence[Format], fixed: int) -> list[dict[str, Any]]:
    """The best plan's size and damage at evenly spread budgets, from the smallest to the largest menu point."""
    least = sum(min(item.bytes(fmt) for fmt in formats) for item in items)
    most = sum(max(item.bytes(fmt) for fmt in formats) for item in items)
    points = []
    for share in np.linspace(0.0, 1.0, FRONTIER_POINTS):
        chosen = solve(items, formats, int(least + share * (most - least)) + 1)
        assert chosen is not None
        size = fixed + sum(item.bytes(formats[index]) for item, index in zip(items, chosen, strict=True))
        hurt = sum(item.damages[index] for item, index in zip(items, chosen, strict=True))
        points.append({"size_bytes": size, "damage": hurt})
    return points


def planned(plan: Artifact, statistics: Statistics) -> dict[str, Choice]:
    """The choices in a report of `plan` for every weight of the statistics. ArtifactError when they do not fit."""
    try:
        rows = json.loads(plan.file(PLAN).read_text(encoding="utf-8"))["tensors"]
        found = {
            row["name"]: Choice(tuple((int(part["rows"]), Format.parse(part["format"])) for part in row["parts"]))
            for row in rows
        }
    except (ConfigError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{PLAN} of {plan.id[:12]} is damaged: {error!r}; plan again") from error
    _check(found, statistics, plan)
    return found


def _check(found: Mapping[str, Choice], statistics: Statistics, plan: Artifact) -> None:
    odd = set(found) ^ set(statistics.weights)
    if odd:
        raise ArtifactError(f"plan {plan.id[:12]} and the calibration disagree about {min(odd)}; plan again")
    for name, choice in found.items():
        rows = statistics.weights[name].shape[0]
        if min((count for count, _ in choice.parts), default=0) < 1 or sum(n for n, _ in choice.parts) != rows:
            raise ArtifactError(f"plan {plan.id[:12]}: the parts of {name} do not make up its {rows} rows; plan again")
