"""Step `plan`: one format per weight, chosen so that the predicted loss increase is least within a budget of bytes.

A multiple-choice knapsack (knapsack.py). Items are weights, and, where rows of a lookup table matter very differently
(frequent and rare tokens), classes of its rows in order of importance; choices are formats. What each costs is measured
on a sample of each weight's rows in one reference format, as what GPTQ will leave of its errors, and carried over to
the other formats by ratios measured on a few weights: how errors fall with bits hardly depends on the weight, how much
they cost does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gulliver.compress.gptq import left_by_feedback, quantize_matrix
from gulliver.compress.knapsack import ENTRY_BYTES, Item, alike, frontier, point, sizes_of, solve
from gulliver.compress.options import PlanOptions
from gulliver.compress.statistics import (
    Joint,
    Statistics,
    Use,
    energies,
    joint_moment,
    likely_increase,
    open_statistics,
)
from gulliver.compress.targets import COMPRESSED, formats_of, holding, joined_with, menu, stays_plain
from gulliver.compress.threads import each
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, BudgetError, ConfigError
from gulliver.core.records import BlockLoss, PartBits, Plan, TensorBits, WeightRow
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
CLASSES = (1 / 96, 1 / 24, 1 / 10, 1 / 5, 1 / 3, 2 / 3, 1.0)
"""Cumulative shares of a lookup table's rows, most important first, that may get formats of their own."""
MIN_CLASS_ROWS = 256
FILE_BYTES, SHARDS = 128, 16


Parts = tuple[tuple[int, Format], ...]
"""What a weight is stored in: (rows, format) of each part, most important rows first."""


def run(cfg: PlanOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """A report with the plan. BudgetError, with the smallest size that is feasible, when the budget is too small."""
    model, calibration = inputs["model"], inputs["calibration"]
    statistics = open_statistics(calibration, model)
    formats = menu(cfg.kind, cfg.min_bits) if cfg.target == "native" else formats_of(cfg.target, cfg.min_bits)
    network = get_task(model.task).load(model.path, empty=True)
    plain = {} if cfg.target == "native" else stays_plain(cfg.target, statistics, network)
    if cfg.target in COMPRESSED and is_packed(model.path):
        canonical = canonical_names(network)
        came_packed = {canonical.get(name, name) for name in read_packing(model.path)}
        told = f"{cfg.target} does not read the blocks that it came in"
        plain |= dict.fromkeys(came_packed - set(statistics.weights), told)
    names = sorted(set(statistics.weights) - set(plain))
    if not names:
        raise ConfigError(f"{cfg.target} holds no weight of this model in few bits: {next(iter(plain.values()))}")
    job, measured = measurer(model, statistics, formats, cfg), []
    costs = [cost(statistics.weights[name], cfg.gptq) for name in names]
    with ctx.progress.stage("plan", total=len(names), unit="weight", costs=costs) as bar:
        for rows in each(job, names, ctx):
            name = rows[0][0].name
            ctx.check_ram(name)
            measured.extend(rows)
            bar.advance(note=name)
    together = joined_with(cfg.target, statistics)
    items = [replace(item, alike=together.get(item.name, "")) for item in items_of(measured, formats)]
    classes = Counter(item.name for item in items)
    fixed = overhead_bytes(model, set(names), set(plain))
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


def cost(row: WeightRow, gptq: bool) -> float:
    """About how many nanoseconds one core needs to predict a weight: what its rows send out, and a factor of H."""
    columns = math.prod(row.shape[1:])
    return 40.0 * len(row.uses) * row.shape[0] * columns + (columns**3 / 300 if gptq else 0.0)


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
        table, joint = any(use.moment.dim() == 1 for use in uses), joint_of(moment)
        for rows in row_classes(uses, matrix) if cfg.target == "native" else [torch.arange(len(matrix))]:
            some = rows[:: max(1, len(rows) // cfg.probe_rows)][: cfg.probe_rows]
            found, sent = dict[Format, float](), energies(matrix, uses, rows)
            held = holding(formats, name, matrix.shape[1])
            for fmt in (REFERENCE, *(held if name in probes else [])):
                part = quantize_matrix(matrix[some], fmt, moment, gptq=False)
                found[fmt] = likely_increase(matrix[some], part, uses, sent, joint)
            base = found[REFERENCE]
            ratios = [found.get(fmt, math.nan) / base for fmt in formats] if name in probes and base > 0 else []
            measured.append((Item(name, len(rows), matrix.shape[1], (base,), table), ratios))
        return measured

    def joint_of(moment: Tensor) -> Joint | None:
        return Joint(moment, left_by_feedback(moment, REFERENCE.group_size)) if cfg.gptq and moment.dim() == 2 else None

    def of_stack(name: str, stack: Tensor) -> tuple[Item, list[float]]:
        """One item for a stack [matrices, rows, columns], measured on some rows of some of its matrices."""
        count, rows, columns = stack.shape
        numbers = range(0, count, max(1, count // PROBED_MATRICES))
        found = np.zeros(1 + (len(formats) if name in probes else 0))
        for number in numbers:
            uses = statistics.uses(name, number)
            some, sent = stack[number][:: max(1, rows * len(numbers) // cfg.probe_rows)], energies(stack[number], uses)
            moment = joint_moment(uses)
            joint = joint_of(moment)
            tried: list[Format] = [REFERENCE, *(formats if name in probes else [])]
            for place, fmt in enumerate(tried):
                part = quantize_matrix(some, fmt, moment, gptq=False)
                found[place] += likely_increase(some, part, uses, sent, joint)
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


def overhead_bytes(model: Artifact, packed: Set[str], plain: Set[str] = frozenset()) -> int:
    """Bytes of what stays as it is (16 bits where it had 32, or where it is among `plain`), and of the files' headers;

    never too few.
    """
    network = get_task(model.task).load(model.path, empty=True)
    canonical, shapes = canonical_names(network), {name: one.shape for name, one in network.named_parameters()}
    blocks = read_packing(model.path) if is_packed(model.path) else {}
    weight_of = {piece: name for name, entry in blocks.items() for piece in stored_names(name, entry.parts)}
    stored = stored_tensors(model.path)
    kept = {canonical.get(name, name): tensor for name, tensor in stored.items() if name not in weight_of}
    total, unpacked = FILE_BYTES * SHARDS, {canonical.get(name, name) for name in blocks} & plain
    for name in unpacked:
        total += 2 * math.prod(shapes[name]) + len(name) + ENTRY_BYTES
    kept |= {
        piece: stored[piece]
        for piece, weight in weight_of.items()
        if canonical.get(weight, weight) not in packed and canonical.get(weight, weight) not in unpacked
    }
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
    table = any(use.moment.dim() == 1 for use in uses)
    shares = [share for share in CLASSES if table and share * len(matrix) >= MIN_CLASS_ROWS]
    counts, before = [], 0
    for share in shares or (1.0,):
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


# ---- the record -----------------------------------------------------------------------------------------------------
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
        **point(items, formats, chosen, fixed).model_dump(),
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
