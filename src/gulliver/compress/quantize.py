"""Step `quantize`: pack a model's weights into few bits, one weight in memory at a time.

By a plan, or all weights in one format. `rtn` rounds each weight to the nearest value of its group's grid; `gptq`
passes every rounding error on to the weights not yet rounded (compress/gptq.py). Each packed weight is
written to scratch as soon as it is done, so a killed run resumes with the next one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gulliver.compress.gptq import codebook_of, quantize_matrix
from gulliver.compress.options import QuantizeOptions
from gulliver.compress.plan import Parts, planned, read_weight, rows_of_classes
from gulliver.compress.statistics import Statistics, Use, joint_moment, loss_increase, open_statistics
from gulliver.compress.threads import each
from gulliver.core.context import Context
from gulliver.core.errors import ConfigError
from gulliver.core.records import (
    NOT_COPIED,
    Calibration,
    LossIncrease,
    PackedWeight,
    Packing,
    PlainTensor,
    PlainTensors,
    Plan,
)
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import temporary_name
from gulliver.nets.files import copy_companions
from gulliver.nets.weights import canonical_names
from gulliver.runtime.formats import Format
from gulliver.runtime.packed import PackedTensor, as_matrix, joined
from gulliver.runtime.packing import is_compressed, order_of_use
from gulliver.runtime.reference import packing_entry, read_stored, stored_form
from gulliver.runtime.shards import PACKED_SHARD_BYTES, ShardWriter
from gulliver.tasks import get_task

TOLD = 3
"""Tensors that are named in the line about what stays at 16 bits."""


def run(cfg: QuantizeOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """The packed model. ConfigError for a model that is packed already, BudgetError beyond the memory limit."""
    model, calibration, plan = inputs["model"], inputs["calibration"], inputs.get("plan")
    if is_compressed(model.path):
        raise ConfigError(f"model {model.id[:12]} is packed already; quantize the model that it came from")
    ctx.check_ram("the start")
    statistics = open_statistics(calibration, model)
    reasons = statistics.table.plain
    if plan is not None:
        choices, reasons = planned(plan, statistics), reasons | Plan.of(plan).plain
    else:
        fixed = Format(cfg.bits, cfg.group_size, cfg.kind)
        choices = {name: ((row.rows, fixed),) for name, row in statistics.weights.items()}
    names = sorted(choices)
    canonical = canonical_names(get_task(model.task).load(model.path, empty=True))
    files = {name: ctx.work / f"weight-{index:05}.safetensors" for index, name in enumerate(names)}
    job = packer(model, canonical, statistics, choices, cfg, files)
    costs = [cost(statistics.weights[name].shape) for name in names]
    with ctx.progress.stage("quantize", total=len(names), unit="weight", costs=costs) as bar:
        for name in each(job, names, ctx):
            ctx.check_ram(name)
            bar.advance(note=name)
    with ctx.writer(kind="model", task=model.task, config=cfg) as writer:
        unpacked = set() if plan is None else set(Plan.of(plan).plain)
        kept = assemble(writer.path, model, canonical, files, reasons, unpacked)
        ctx.progress.print(f"quantize: {told(kept)}")
        Calibration.of(calibration).write(writer.path)
        copy_companions(model.paths(), writer.path, NOT_COPIED)
        return writer.commit()


def cost(shape: Sequence[int]) -> float:
    """About how many nanoseconds one core rounds a weight [rows, …]: its codes, its errors' products, a factor of H."""
    rows, columns = shape[0], math.prod(shape[1:])
    return rows * columns * (30 + 0.03 * columns) + columns**3 / 300


def packer(
    model: Artifact,
    canonical: Mapping[str, str],
    statistics: Statistics,
    choices: Mapping[str, Parts],
    cfg: QuantizeOptions,
    files: Mapping[str, Path],
) -> Callable[[str], str]:
    """A function, thread-safe, that leaves a packed weight, as stored, in its file with what is known about it.

    It takes and returns the weight's name; what an earlier run left stays.
    """

    def job(name: str) -> str:
        if files[name].is_file():
            return name
        row, weight = statistics.weights[name], read_weight(model.path, name, canonical)
        matrix, parts, increase, row_part = as_matrix(weight, row.inputs), [], 0.0, None
        if len(choices[name]) > 1:
            row_part = torch.empty(len(matrix), dtype=torch.uint8)
        for piece in pieces(matrix, choices[name], statistics, name):
            chosen = matrix[piece.rows]
            part = quantize_matrix(
                chosen, piece.fmt, piece.moment, gptq=cfg.method == "gptq", sweeps=cfg.sweeps, codebook=piece.codebook
            )
            increase += loss_increase(chosen, part, piece.uses)
            if row_part is not None:
                row_part[piece.rows] = len(parts)
            parts.append(part)
        packed = PackedTensor(tuple(weight.shape), [joined(parts)] if row.matrices > 1 else parts, row_part, row.inputs)
        facts = json.dumps({"packing": packing_entry(packed).model_dump(mode="json"), "loss_increase": increase})
        temporary = temporary_name(files[name])
        save_file(stored_form(name, packed), str(temporary), metadata={"facts": facts})
        temporary.rename(files[name])
        return name

    return job


@dataclass(frozen=True)
class Piece:
    """Rows of a weight that are packed together: which (int64 [n], or a run), and by which statistics of these rows.

    `moment` is H [columns, columns] or its diagonal; `codebook` int8 [levels] where the format has one.
    """

    rows: slice | Tensor
    fmt: Format
    moment: Tensor
    uses: list[Use]
    codebook: Tensor | None


def pieces(matrix: Tensor, choice: Parts, statistics: Statistics, name: str) -> Iterator[Piece]:
    """The classes of rows of a weight [rows, columns], each with a format of its own; or its matrices, which share one.

    Each matrix of a stack has statistics of its own, and all have one codebook.
    """
    row = statistics.weights[name]
    if row.matrices > 1:
        ((_, fmt),) = choice
        codebook, rows = codebook_of(matrix, fmt, None) if fmt.kind == "codebook" else None, row.rows // row.matrices
        for number in range(row.matrices):
            uses = statistics.uses(name, number)
            yield Piece(slice(number * rows, (number + 1) * rows), fmt, joint_moment(uses), uses, codebook)
        return
    uses = statistics.uses(name)
    moment = joint_moment(uses)
    for rows, (_, fmt) in zip(rows_of_classes(uses, matrix, [count for count, _ in choice]), choice, strict=True):
        own = uses if len(choice) == 1 else [Use(use.moment, use.rows[rows]) for use in uses]
        some = slice(None) if len(choice) == 1 else rows
        codebook = codebook_of(matrix[some], fmt, moment) if fmt.kind == "codebook" else None
        yield Piece(some, fmt, moment, own, codebook)


def assemble(
    folder: Path,
    model: Artifact,
    canonical: Mapping[str, str],
    files: Mapping[str, Path],
    reasons: Mapping[str, str],
    unpacked: Set[str],
) -> PlainTensors:
    """Write the weight files of a packed model: packed weights in the order of use, each from its file; then the rest,

    which has 16 bits at most; and the records that say how each is packed, what that is predicted to cost, and what
    stays plain for which of the `reasons` by name. Blocks of another tool stay, but not those of `unpacked` weights.
    Returns the last.
    """
    packing: dict[str, PackedWeight] = {}
    plain: dict[str, PlainTensor] = {}
    packed_bytes = 0
    increases: dict[str, float] = {}
    with ShardWriter(folder, PACKED_SHARD_BYTES) as shards:
        for name in sorted(files, key=order_of_use):
            with safe_open(files[name], framework="pt") as opened:
                facts = json.loads(opened.metadata()["facts"])
            packing[name] = PackedWeight.model_validate(facts["packing"], strict=False)
            increases[name] = facts["loss_increase"]
            pieces = load_file(files[name])
            packed_bytes += sum(piece.nbytes for piece in pieces.values())
            shards.add(pieces)
        for stored, tensor in read_stored(model.path, lambda one: canonical.get(one, one) not in files):
            name = canonical.get(stored, stored)
            if isinstance(tensor, PackedTensor) and name in unpacked:
                tensor = tensor.dequantize(torch.bfloat16)
            if isinstance(tensor, PackedTensor):  # blocks of another tool that no plan has touched
                packing[name], pieces = packing_entry(tensor), stored_form(name, tensor)
                packed_bytes += sum(piece.nbytes for piece in pieces.values())
                shards.add(pieces)
            elif name not in shards.names:  # tied tensors once, by their first name
                stays = narrow(tensor)
                shards.add({name: stays})
                reason = reasons.get(name, "a vector" if tensor.dim() < 2 else "no weight of the network")
                plain[name] = PlainTensor(size_bytes=stays.nbytes, reason=reason)
    Packing(tensors=packing).write(folder)
    LossIncrease(weights=increases).write(folder)
    plain_bytes = sum(row.size_bytes for row in plain.values())
    found = PlainTensors(share=plain_bytes / max(1, plain_bytes + packed_bytes), tensors=plain)
    found.write(folder)
    return found


def told(kept: PlainTensors) -> str:
    """One line: how much stays at 16 bits, and the largest tensors of it that are no vectors, with the reason."""
    size = sum(row.size_bytes for row in kept.tensors.values())
    line = f"{len(kept.tensors)} tensors stay at 16 bits, {kept.share:.1%} of the bytes ({size / 1e6:.2f} MB)"
    others = sorted(
        (row.size_bytes, name, row.reason) for name, row in kept.tensors.items() if row.reason != "a vector"
    )
    for _, name, reason in others[: -1 - TOLD : -1]:
        line += f"; {name}: {reason}"
    return line + ("; the model's card lists them" if kept.tensors else "")


def narrow(tensor: Tensor) -> Tensor:
    """A float32 tensor of any shape as float16 unless it has values beyond float16's range; any other as it is."""
    if tensor.dtype != torch.float32 or not bool((tensor.abs() < 65_504.0).all()):
        return tensor
    return tensor.to(torch.float16)
