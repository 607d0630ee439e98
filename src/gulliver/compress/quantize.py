"""Step `quantize`: pack a model's weights into few bits, one weight in memory at a time.

By a plan, or all weights in one format. `rtn` rounds each weight to the nearest value of its group's grid; `gptq`
passes every rounding error on to the weights not yet rounded (compress/gptq.py). Each packed weight is
written to scratch as soon as it is done, so a killed run resumes with the next one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
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
from gulliver.runtime.packed import PackedTensor, RowGroup, as_matrix, joined
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
    job = packer(model, canonical, statistics, choices, cfg.method == "gptq", files)
    costs = [cost(statistics.weights[name].shape) for name in names]
    with ctx.progress.stage("quantize", total=len(names), unit="weight", costs=costs) as bar:
        for name in each(job, names, ctx):
            ctx.check_ram(name)
            bar.advance(note=name)
    with ctx.writer(kind="model", task=model.task, config=cfg) as writer:
        kept = assemble(writer.path, model, canonical, files, reasons)
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
    gptq: bool,
    files: Mapping[str, Path],
) -> Callable[[str], str]:
    """A function, thread-safe, that leaves a packed weight, as stored, in its file with what is known about it.

    It takes and returns the weight's name; what an earlier run left stays.
    """

    def job(name: str) -> str:
        if files[name].is_file():
            return name
        row, weight = statistics.weights[name], read_weight(model.path, name, canonical)
        matrix = as_matrix(weight, row.inputs)
        if row.matrices > 1:
            ((_, fmt),) = choices[name]
            part, increase = pack_stack(matrix.view(row.matrices, -1, matrix.shape[1]), fmt, statistics, name, gptq)
            packed = PackedTensor(tuple(weight.shape), [part], None, row.inputs)
        else:
            parts, row_part, increase = pack_matrix(matrix, choices[name], statistics.uses(name), gptq)
            packed = PackedTensor(tuple(weight.shape), parts, row_part, row.inputs)
        facts = json.dumps({"packing": packing_entry(packed).model_dump(mode="json"), "loss_increase": increase})
        temporary = temporary_name(files[name])
        save_file(stored_form(name, packed), str(temporary), metadata={"facts": facts})
        temporary.rename(files[name])
        return name

    return job


def pack_matrix(
    matrix: Tensor, choice: Parts, uses: list[Use], gptq: bool
) -> tuple[list[RowGroup], Tensor | None, float]:
    """The parts of a matrix [rows, columns], the part of each row (uint8 [rows]), and the predicted loss increase."""
    classes = rows_of_classes(uses, matrix, [count for count, _ in choice])
    row_part = torch.empty(len(matrix), dtype=torch.uint8) if len(classes) > 1 else None
    moment, increase, parts = joint_moment(uses), 0.0, []
    for index, (rows, (_, fmt)) in enumerate(zip(classes, choice, strict=True)):
        chosen = matrix if row_part is None else matrix[rows]
        codebook = codebook_of(chosen, fmt, moment) if fmt.kind == "codebook" else None
        part = quantize_matrix(chosen, fmt, moment, gptq=gptq, codebook=codebook)
        increase += loss_increase(chosen, part, uses, None if row_part is None else rows)
        parts.append(part)
        if row_part is not None:
            row_part[rows] = index
    return parts, row_part, increase


def pack_stack(stack: Tensor, fmt: Format, statistics: Statistics, name: str, gptq: bool) -> tuple[RowGroup, float]:
    """All matrices of a stack [matrices, rows, columns], each by its own statistics, as one part with one codebook."""
    codebook, increase, parts = None, 0.0, []
    if fmt.kind == "codebook":
        codebook = codebook_of(stack.flatten(0, 1), fmt, None)
    for number, matrix in enumerate(stack):
        uses = statistics.uses(name, number)
        part = quantize_matrix(matrix, fmt, joint_moment(uses), gptq=gptq, codebook=codebook)
        increase += loss_increase(matrix, part, uses)
        parts.append(part)
    return joined(parts), increase


def assemble(
    folder: Path,
    model: Artifact,
    canonical: Mapping[str, str],
    files: Mapping[str, Path],
    reasons: Mapping[str, str],
) -> PlainTensors:
    """Write the weight files of a packed model: packed weights in the order of use, each from its file; then the rest,

    which has 16 bits at most; and the records that say how each is packed, what that is predicted to cost, and what
    stays plain for which of the `reasons` by name. Returns the last.
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
