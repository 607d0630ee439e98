"""Step `plan`: one format per weight, chosen so that the predicted loss increase is least within a budget of bytes.

A multiple-choice knapsack. Items are weights, and, where rows of a lookup table matter very differently (frequent and
rare tokens), classes of its rows in order of importance; choices are formats. With b bytes, D the predicted increase of
the loss and x in {0, 1}:

    minimise  Σ D[i, f] x[i, f]    subject to  Σ b[i, f] x[i, f] <= budget,   Σ_f x[i, f] = 1 for every item i

solved exactly by HiGHS (Huangfu and Hall, Parallelizing the dual revised simplex method, 2018). D is measured on a
sample of each weight's rows in one reference format, with GPTQ as `quantize` does it, and carried over to
the other formats by ratios measured on a few weights: how errors fall with bits hardly depends on the weight, how much
they cost does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix
from torch import Tensor

from gulliver.compress.gptq import quantize_matrix
from gulliver.compress.options import PlanOptions
from gulliver.compress.sizes import overhead_bytes, packed_overhead_bytes
from gulliver.compress.statistics import Statistics, Use, joint_moment, loss_increase, open_statistics
from gulliver.compress.threads import each, workers
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, BudgetError, ConfigError
from gulliver.core.records import BlockLoss, PartBits, Plan, PlannedPoint, TensorBits
from gulliver.core.stdout import stdout_into
from gulliver.core.store.artifact import Artifact
from gulliver.nets.weights import canonical_names, read_safetensors
from gulliver.runtime.formats import CODEBOOK_BITS, GROUP_SIZES, PLANES, TILE_ROWS, Format
from gulliver.tasks import get_task

REFERENCE = Format(4, 64, "codebook")
PROBES = 8
CLASSES = (1 / 24, 1 / 8, 1 / 3, 1.0)
"""Cumulative shares of a lookup table's rows, most important first, that may get formats of their own."""
MIN_CLASS_ROWS = 64
FRONTIER_POINTS = 12
GAP = 1e-4


@dataclass(frozen=True)
class Measured:
    """A class of rows of a weight: its loss increase in the reference format, and each format's divided by that."""

    name: str
    rows: int
    columns: int
    loss_increase: float
    ratios: list[float]


@dataclass(frozen=True)
class Item:
    """Something that gets one format: `rows` of a weight, with a predicted loss increase for each format."""

    name: str
    rows: int
    columns: int
    loss_increases: tuple[float, ...]

    def bytes(self, fmt: Format) -> int:
        """Bytes in the weight files, the header's entries included."""
        return fmt.packed_bytes(self.rows, self.columns) + packed_overhead_bytes(self.name, fmt)


@dataclass(frozen=True)
class Choice:
    """What a weight is stored in: (rows, format) of each part, most important rows first."""

    parts: tuple[tuple[int, Format], ...]


def run(cfg: PlanOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """A report with the plan. BudgetError, with the smallest size that is feasible, when the budget is too small."""
    model, calibration = inputs["model"], inputs["calibration"]
    statistics = open_statistics(calibration, model)
    formats = menu(cfg.kind, cfg.min_bits)
    job, measured = measurer(model, statistics, formats, cfg), []
    with ctx.progress.stage("plan", total=len(statistics.weights), unit="weight") as bar:
        for rows in each(job, sorted(statistics.weights), workers(ctx)):
            ctx.check_ram(rows[0].name)
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
    plan = plan_of(items, formats, chosen, statistics, cfg, fixed)
    with ctx.writer(kind="report", task=model.task, config=cfg) as writer:
        plan.write(writer.path)
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
        matrix, uses = read_weight(model.path, name, canonical).flatten(1), statistics.uses(name)
        moment, measured = joint_moment(uses), []
        for rows in row_classes(uses, matrix):
            some, scale = sampled(rows, cfg.probe_rows)
            found: list[float] = []
            for fmt in [REFERENCE, *(formats if name in probes else [])]:
                part = quantize_matrix(matrix[some], fmt, moment, gptq=cfg.gptq)
                found.append(loss_increase(matrix[some], part, uses, some))
            base, others = found[0], found[1:]
            ratios = [one / base for one in others] if base > 0 else []
            measured.append(Measured(name, len(rows), matrix.shape[1], scale * base, ratios))
        return measured

    return job


def items_of(measured: Sequence[Measured], formats: Sequence[Format]) -> list[Item]:
    """Items with a loss increase for every format: that in the reference format, times the other's typical ratio."""
    table = np.array([row.ratios for row in measured if row.ratios])
    typical = np.exp(np.mean(np.log(np.maximum(table, 1e-12)), 0)) if len(table) else np.ones(len(formats))
    return [
        Item(row.name, row.rows, row.columns, tuple(float(row.loss_increase * one) for one in typical))
        for row in measured
    ]


def read_weight(folder: Path, name: str, canonical: Mapping[str, str]) -> Tensor:
    """One weight of a plain folder, as stored, of any shape, under any of its names. ConfigError if it has none."""
    for _, tensor in read_safetensors(folder, only=lambda stored: canonical.get(stored) == name):
        return tensor
    raise ConfigError(f"{folder} holds no weights for {name}; compress a plain model as `gulliver pull` makes it")


def row_lists(items: Sequence[Item]) -> int:
    """Bytes of the lists that say which rows are in which part: one a row where a weight may have several parts."""
    names = [item.name for item in items]
    return sum(item.rows for item in items if names.count(item.name) > 1)


def sampled(rows: Tensor, count: int) -> tuple[Tensor, float]:
    """At most `count` of `rows`, int64 [rows] of indices, evenly spread; and how many rows each stands for."""
    step = max(1, len(rows) // count)
    some = rows[::step][:count]
    return some, len(rows) / len(some)


def importance(uses: list[Use], matrix: Tensor) -> Tensor:
    """How much each row matters: its weight in every use times the energy it sends out there, float32 [rows]."""
    total = torch.zeros(len(matrix))
    for use in uses:
        diagonal = use.moment.diagonal() if use.moment.dim() == 2 else use.moment
        total += use.rows * float(diagonal.mean())
    return total


def row_classes(uses: list[Use], matrix: Tensor) -> list[Tensor]:
    """The row sets of `matrix` [rows, columns] that may get formats of their own; each int64 [rows of the set].

    Several for a lookup table, all rows in one for others.
    """
    table = any(use.moment.dim() == 1 for use in uses) and len(matrix) * CLASSES[0] >= MIN_CLASS_ROWS
    counts, before = [], 0
    for share in CLASSES if table else (1.0,):
        stop = len(matrix) if share == 1.0 else int(share * len(matrix)) // TILE_ROWS * TILE_ROWS
        counts.append(stop - before)
        before = stop
    return rows_of_classes(uses, matrix, counts)


def rows_of_classes(uses: list[Use], matrix: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Rows of `matrix` [rows, columns] by falling importance, cut into classes of `counts`: int64 [count], sorted."""
    if len(counts) == 1:
        return [torch.arange(len(matrix))]
    order = importance(uses, matrix).argsort(descending=True, stable=True)
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
    costs = np.array([item.loss_increases for item in items]).ravel()
    scale = costs.sum() / len(costs) or 1.0
    with open(os.devnull, "wb") as nowhere, stdout_into(nowhere.fileno()):  # HiGHS chatters past Python
        found = milp(
            costs / scale,
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


def plan_of(
    items: Sequence[Item],
    formats: Sequence[Format],
    chosen: Sequence[int],
    statistics: Statistics,
    cfg: PlanOptions,
    fixed: int,
) -> Plan:
    """The record of a plan; loss increases are in the unit of the statistics."""
    groups: dict[str, list[PartBits]] = {}
    blocks = dict.fromkeys(statistics.table.blocks, 0.0)
    for item, index in zip(items, chosen, strict=True):
        parts = groups.setdefault(item.name, [])
        before = parts.pop() if parts and parts[-1].format == formats[index].name else None
        parts.append(_part(item, formats[index], item.loss_increases[index], before))
        blocks[statistics.weights[item.name].block] += item.loss_increases[index]
    used = {row.block for row in statistics.weights.values()}
    return Plan(
        budget_bytes=cfg.size_bytes,
        **_point(items, formats, chosen, fixed).model_dump(),
        tensors=tuple(
            TensorBits(
                name=name,
                shape=statistics.weights[name].shape,
                size_bytes=sum(part.size_bytes for part in parts),
                parts=tuple(parts),
            )
            for name, parts in groups.items()
        ),
        blocks=tuple(BlockLoss(name=name, loss_increase=cost) for name, cost in blocks.items() if name in used),
        frontier=tuple(frontier(items, formats, fixed)),
    )


def _part(item: Item, fmt: Format, increase: float, before: PartBits | None) -> PartBits:
    """A class of rows in a format, together with the classes before it that have the same one."""
    rows, size = item.rows, fmt.packed_bytes(item.rows, item.columns)
    if before is not None:
        rows, size = rows + before.rows, size + before.size_bytes
        increase += before.loss_increase or 0.0
    bits = 8 * size / (rows * item.columns)
    return PartBits(rows=rows, format=fmt.name, bits_per_weight=bits, size_bytes=size, loss_increase=increase)


def _point(items: Sequence[Item], formats: Sequence[Format], chosen: Sequence[int], fixed: int) -> PlannedPoint:
    """Bytes of all weight files and predicted loss increase of a choice."""
    pairs = list(zip(items, chosen, strict=True))
    return PlannedPoint(
        size_bytes=fixed + sum(item.bytes(formats[index]) for item, index in pairs),
        loss_increase=sum(item.loss_increases[index] for item, index in pairs),
    )


def frontier(items: Sequence[Item], formats: Sequence[Format], fixed: int) -> Iterator[PlannedPoint]:
    """The best plans at evenly spread budgets, from the smallest that is possible to the largest."""
    least = sum(min(item.bytes(fmt) for fmt in formats) for item in items)
    most = sum(max(item.bytes(fmt) for fmt in formats) for item in items)
    for share in np.linspace(0.0, 1.0, FRONTIER_POINTS):
        chosen = solve(items, formats, int(least + share * (most - least)) + 1)
        assert chosen is not None
        yield _point(items, formats, chosen, fixed)


def planned(plan: Artifact, statistics: Statistics) -> dict[str, Choice]:
    """The choices in a report of `plan` for every weight of the statistics. ArtifactError when they do not fit."""
    try:
        found = {
            row.name: Choice(tuple((part.rows, Format.parse(part.format)) for part in row.parts))
            for row in Plan.of(plan).tensors
        }
    except ConfigError as error:
        raise ArtifactError(f"{Plan.file} of {plan.id[:12]}: {error}; plan again") from error
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
