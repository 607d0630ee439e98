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

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix
from torch import Tensor

from gulliver.compress.gptq import quantize_matrix
from gulliver.compress.kquant import Solver
from gulliver.compress.options import PlanOptions
from gulliver.compress.statistics import Statistics, Use, energies, joint_moment, likely_increase, open_statistics
from gulliver.compress.targets import formats_of, holding, joined_with, menu, stays_plain
from gulliver.compress.threads import each
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, BudgetError, ConfigError
from gulliver.core.records import BlockLoss, PartBits, Plan, PlannedPoint, TensorBits
from gulliver.core.stdout import stdout_into
from gulliver.core.store.artifact import Artifact
from gulliver.nets.files import ITEM_BYTES, stored_tensors
from gulliver.nets.weights import canonical_names
from gulliver.runtime.formats import TILE_ROWS, Format
from gulliver.runtime.packed import as_matrix
from gulliver.runtime.packing import is_packed, read_packing, stored_names
from gulliver.runtime.reference import read_stored
from gulliver.tasks import get_task

REFERENCE = Format(4, 64, "codebook")
PROBES = 8
PROBED_MATRICES = 8
"""Matrices of a stack, at most about, on which its loss increase is predicted."""
CLASSES = (1 / 24, 1 / 8, 1 / 3, 1.0)
"""Cumulative shares of a lookup table's rows, most important first, that may get formats of their own."""
MIN_CLASS_ROWS = 64
TABLE_BITS, FORBIDDEN = 3, 1e3
"""Fewest bits of a lookup table's rows unless nothing else fits: rows that calibration hardly reads cost a text of
another language far more than is predicted. Fewer bits cost FORBIDDEN times the mean loss increase."""
FRONTIER_POINTS = 12
GAP = 1e-4
ENTRY_BYTES = 96
"""Room for one tensor's entry in a safetensors header beside its name: dtype, shape and offsets, written out."""
FILE_BYTES, SHARDS = 128, 16


@dataclass(frozen=True)
class Item:
    """Something that gets one format: `rows` of a weight, with a predicted loss increase for each format."""

    name: str
    rows: int
    columns: int
    loss_increases: tuple[float, ...]
    table: bool = False
    alike: str = ""  # what those have in common that must get one format; "" where it is free

    def bytes(self, fmt: Format) -> int:
        """Bytes in the weight files, at most, the header's entries (tiles, codebook, list of rows) included."""
        entries = (len(self.name) + 16 + ENTRY_BYTES) * (3 if fmt.kind in ("codebook", "symmetric") else 2)
        return fmt.packed_bytes(self.rows, self.columns) + entries


Parts = tuple[tuple[int, Format], ...]
"""What a weight is stored in: (rows, format) of each part, most important rows first."""


def run(cfg: PlanOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """A report with the plan. BudgetError, with the smallest size that is feasible, when the budget is too small."""
    model, calibration = inputs["model"], inputs["calibration"]
    statistics = open_statistics(calibration, model)
    formats = menu(cfg.kind, cfg.min_bits) if cfg.target == "native" else formats_of(cfg.target, cfg.min_bits)
    network = get_task(model.task).load(model.path, empty=True)
    plain = {} if cfg.target == "native" else stays_plain(cfg.target, statistics, network)
    names = sorted(set(statistics.weights) - set(plain))
    if not names:
        raise ConfigError(f"{cfg.target} holds no weight of this model in few bits: {next(iter(plain.values()))}")
    job, measured = measurer(model, statistics, formats, cfg), []
    with ctx.progress.stage("plan", total=len(names), unit="weight") as bar:
        for rows in each(job, names, ctx):
            name = rows[0][0].name
            ctx.check_ram(name)
            measured.extend(rows)
            bar.advance(note=name)
    together = joined_with(cfg.target, statistics)
    items = [replace(item, alike=together.get(item.name, "")) for item in items_of(measured, formats)]
    classes = Counter(item.name for item in items)
    fixed = overhead_bytes(model, set(names))
    fixed += sum(item.rows for item in items if classes[item.name] > 1)  # lists that say which part a row is in
    smallest = fixed + int(np.ceil(alike(items, sizes_of(items, formats)).min(1).sum()))
    chosen = solve(items, formats, cfg.size_bytes - fixed)
    if chosen is None:
        raise BudgetError(
            f"{cfg.size_bytes:,} bytes are too few: this model needs at least {smallest:,} ({smallest / 1e6:.1f} MB)",
            {"size_bytes": smallest},
        )
    with ctx.writer(kind="report", task=model.task, config=cfg) as writer:
        found = plan_of(items, formats, chosen, statistics, cfg, fixed)
        found.model_copy(update={"plain": plain}).write(writer.path)
        return writer.commit()


# ---- what each choice costs -----------------------------------------------------------------------------------------
def measurer(
    model: Artifact, statistics: Statistics, formats: Sequence[Format], cfg: PlanOptions
) -> Callable[[str], list[tuple[Item, list[float]]]]:
    """A function, thread-safe, from a weight's name to each class of its rows: an item with its loss increase in the

    reference format alone, and, for some weights, those of all formats divided by it.
    """
    canonical = canonical_names(get_task(model.task).load(model.path, empty=True))
    names = sorted(statistics.weights)
    probes = _probes(names, statistics, cfg)

    def job(name: str) -> list[tuple[Item, list[float]]]:
        row = statistics.weights[name]
        matrix = as_matrix(read_weight(model.path, name, canonical), row.inputs)
        if row.matrices > 1:
            return [of_stack(name, matrix.view(row.matrices, -1, matrix.shape[1]))]
        uses = statistics.uses(name)
        moment, measured = joint_moment(uses), []
        table = any(use.moment.dim() == 1 for use in uses)
        kept: dict[tuple[int, int], Solver] = {}
        for rows in row_classes(uses, matrix) if cfg.target == "native" else [torch.arange(len(matrix))]:
            some = rows[:: max(1, len(rows) // cfg.probe_rows)][: cfg.probe_rows]
            found, sent = dict[Format, float](), energies(matrix, uses, rows)
            held = holding(formats, name, matrix.shape[1])
            tried = [REFERENCE, *(held if name in probes else [])]
            for fmt in sorted(tried, key=lambda one: one.nesting):  # what is kept is of one nesting
                part = quantize_matrix(matrix[some], fmt, moment, gptq=cfg.gptq, kept=kept)
                found[fmt] = likely_increase(matrix[some], part, uses, sent)
            base = found[REFERENCE]
            ratios = [found.get(fmt, math.nan) / base for fmt in formats] if name in probes and base > 0 else []
            measured.append((Item(name, len(rows), matrix.shape[1], (base,), table), ratios))
        return measured

    def of_stack(name: str, stack: Tensor) -> tuple[Item, list[float]]:
        """One item for a stack [matrices, rows, columns], measured on some rows of some of its matrices."""
        count, rows, columns = stack.shape
        numbers = range(0, count, max(1, count // PROBED_MATRICES))
        found = np.zeros(1 + (len(formats) if name in probes else 0))
        for number in numbers:
            uses = statistics.uses(name, number)
            some, sent = stack[number][:: max(1, rows * len(numbers) // cfg.probe_rows)], energies(stack[number], uses)
            tried: list[Format] = [REFERENCE, *(formats if name in probes else [])]
            for place, fmt in enumerate(tried):
                part = quantize_matrix(some, fmt, joint_moment(uses), gptq=cfg.gptq)
                found[place] += likely_increase(some, part, uses, sent)
        ratios = [float(one / found[0]) for one in found[1:]] if found[0] > 0 else []
        return Item(name, count * rows, columns, (float(found[0]) * count / len(numbers),)), ratios

    return job


def _probes(names: Sequence[str], statistics: Statistics, cfg: PlanOptions) -> set[str]:
    """The weights on which every format is measured: some of all, and of every width where a type has whole blocks."""
    found = set(names[:: max(1, len(names) // PROBES)])
    if cfg.target != "native":
        by_width: dict[int, list[str]] = {}
        for name in names:
            by_width.setdefault(columns_of(statistics, name), []).append(name)
        for alike in by_width.values():
            found |= set(alike[:: max(1, len(alike) // 3)])
    return found


def overhead_bytes(model: Artifact, packed: Set[str]) -> int:
    """Bytes of what stays as it is (16 bits where it had 32), and of the files' headers; never too few."""
    canonical = canonical_names(get_task(model.task).load(model.path, empty=True))
    blocks = read_packing(model.path) if is_packed(model.path) else {}
    weight_of = {piece: name for name, entry in blocks.items() for piece in stored_names(name, entry.parts)}
    stored = stored_tensors(model.path)
    kept = {canonical.get(name, name): tensor for name, tensor in stored.items() if name not in weight_of}
    kept |= {name: stored[name] for name, weight in weight_of.items() if canonical.get(weight, weight) not in packed}
    total = FILE_BYTES * SHARDS
    for name, tensor in kept.items():
        if name not in packed:
            item_bytes = 2 if tensor.dtype == "F32" else ITEM_BYTES[tensor.dtype]
            total += math.prod(tensor.shape) * item_bytes + len(name) + ENTRY_BYTES
    return total


def items_of(measured: Sequence[tuple[Item, list[float]]], formats: Sequence[Format]) -> list[Item]:
    """Items with a loss increase for every format: that in the reference format, times the other's typical ratio.

    Infinite for a format that does not hold an item's rows.
    """
    table = np.array([ratios for _, ratios in measured if ratios])
    typical = np.ones(len(formats))
    if len(table):
        tried = ~np.isnan(table)
        logarithms = np.where(tried, np.log(np.maximum(table, 1e-12, where=tried, out=np.ones_like(table))), 0.0)
        typical = np.exp(logarithms.sum(0) / np.maximum(tried.sum(0), 1))
    return [
        replace(
            item,
            loss_increases=tuple(
                float(item.loss_increases[0] * ratio) if fmt.holds(item.columns) else math.inf
                for fmt, ratio in zip(formats, typical, strict=True)
            ),
        )
        for item, _ in measured
    ]


def sizes_of(items: Sequence[Item], formats: Sequence[Format]) -> np.ndarray:
    """Bytes of every item in every format, float64 [items, formats]; infinite where it cannot hold its rows."""
    return np.array([[item.bytes(fmt) if fmt.holds(item.columns) else np.inf for fmt in formats] for item in items])


def columns_of(statistics: Statistics, name: str) -> int:
    """Columns of a weight, its further dimensions flattened."""
    return math.prod(statistics.weights[name].shape[1:])


def read_weight(folder: Path, name: str, canonical: Mapping[str, str]) -> Tensor:
    """One weight as it is stored, of any shape, under any of its names. ConfigError if the folder has none."""
    for _, tensor in read_stored(folder, lambda stored: canonical.get(stored) == name):
        return tensor if isinstance(tensor, Tensor) else tensor.dequantize()
    raise ConfigError(f"{folder} holds no weights for {name}; compress a plain model as `gulliver pull` makes it")


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
    sizes = alike(items, sizes_of(items, formats))
    if sizes.min(1).sum() > budget_bytes:
        return None
    count, width = sizes.shape
    rows = np.repeat(np.arange(count), width)
    one_each = csr_matrix((np.ones(count * width), (rows, np.arange(count * width))))
    held = np.isfinite(sizes).ravel()
    costs = np.where(held, alike(items, np.array([item.loss_increases for item in items])).ravel(), 0.0)
    weights = np.where(held, sizes.ravel(), 0.0)
    scale = costs.sum() / len(costs) or 1.0
    barred = np.array([[one.table and fmt.bits < TABLE_BITS for fmt in formats] for one in items], np.float64)
    costs += FORBIDDEN * scale * alike(items, barred).ravel()
    with open(os.devnull, "wb") as nowhere, stdout_into(nowhere.fileno()):  # HiGHS chatters past Python
        found = milp(
            costs / scale,
            constraints=[
                LinearConstraint(csr_matrix(weights[None] / 1e6), -np.inf, budget_bytes / 1e6),
                LinearConstraint(one_each, 1, 1),
            ],
            integrality=np.ones(count * width),
            bounds=Bounds(np.zeros(count * width), held.astype(np.float64)),  # type: ignore[arg-type]
            options={"mip_rel_gap": GAP, "time_limit": 30.0},
        )
    assert found.x is not None, f"HiGHS found no plan within {budget_bytes} bytes: {found.message}"
    chosen = found.x.reshape(count, width).argmax(1)
    assert sizes[np.arange(count), chosen].sum() <= budget_bytes + 1, "the solver's plan is larger than the budget"
    return [int(chosen[number]) for number in numbers(items)]


def numbers(items: Sequence[Item]) -> list[int]:
    """The number of each item's decision; those that must be alike share one."""
    keys = [item.alike or f"\0{place}" for place, item in enumerate(items)]
    places = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [places[key] for key in keys]


def alike(items: Sequence[Item], table: np.ndarray) -> np.ndarray:
    """A row for each decision, the sum of its items' rows of `table` [items, formats]."""
    which = numbers(items)
    found = np.zeros((max(which) + 1, table.shape[1]))
    np.add.at(found, which, table)
    return found


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
    rows = [(item, formats[index], item.loss_increases[index]) for item, index in zip(items, chosen, strict=True)]
    for item, _, increase in rows:
        blocks[statistics.weights[item.name].block] += increase
    for (name, fmt), run in groupby(rows, lambda row: (row[0].name, row[1])):  # neighbours of one format are one part
        classes = list(run)
        size = sum(fmt.packed_bytes(item.rows, item.columns) for item, _, _ in classes)
        count = sum(item.rows for item, _, _ in classes)
        bits = 8 * size / (count * classes[0][0].columns)
        increase = sum(increase for _, _, increase in classes)
        part = PartBits(rows=count, format=fmt.name, bits_per_weight=bits, size_bytes=size, loss_increase=increase)
        groups.setdefault(name, []).append(part)
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


def _point(items: Sequence[Item], formats: Sequence[Format], chosen: Sequence[int], fixed: int) -> PlannedPoint:
    """Bytes of all weight files and predicted loss increase of a choice."""
    pairs = list(zip(items, chosen, strict=True))
    return PlannedPoint(
        size_bytes=fixed + sum(item.bytes(formats[index]) for item, index in pairs),
        loss_increase=sum(item.loss_increases[index] for item, index in pairs),
    )


def frontier(items: Sequence[Item], formats: Sequence[Format], fixed: int) -> Iterator[PlannedPoint]:
    """The best plans at evenly spread budgets, from the smallest that is possible to the largest."""
    sizes = sizes_of(items, formats)
    least, most = (
        int(np.ceil(alike(items, sizes).min(1).sum())),
        int(np.where(np.isfinite(sizes), sizes, 0).max(1).sum()),
    )
    for share in np.linspace(0.0, 1.0, FRONTIER_POINTS):
        chosen = solve(items, formats, int(least + share * (most - least)) + 1)
        assert chosen is not None
        yield _point(items, formats, chosen, fixed)


def planned(plan: Artifact, statistics: Statistics) -> dict[str, Parts]:
    """The parts in a report of `plan` for every weight of the statistics. ArtifactError when they do not fit."""
    try:
        found = {
            row.name: tuple((part.rows, Format.parse(part.format)) for part in row.parts)
            for row in Plan.of(plan).tensors
        }
    except ConfigError as error:
        raise ArtifactError(f"{Plan.file} of {plan.id[:12]}: {error}; plan again") from error
    odd = set(found) ^ (set(statistics.weights) - set(Plan.of(plan).plain))
    if odd:
        raise ArtifactError(f"plan {plan.id[:12]} and the calibration disagree about {min(odd)}; plan again")
    for name, parts in found.items():
        rows = statistics.weights[name].rows
        if min((count for count, _ in parts), default=0) < 1 or sum(count for count, _ in parts) != rows:
            raise ArtifactError(f"plan {plan.id[:12]}: the parts of {name} do not make up its {rows} rows; plan again")
    return found
