"""Step `quantize`: pack a model's weights into few bits, one weight in memory at a time.

By a plan, or all weights in one format. `nearest` rounds each weight to the nearest value of its group's grid;
`feedback` passes every rounding error on to the weights not yet rounded (compress/feedback.py). Each packed weight is
written to scratch as soon as it is done, so a killed run goes on with the next one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from gulliver.compress.calibrate import check_ram
from gulliver.compress.export_shards import ShardWriter
from gulliver.compress.feedback import quantize_matrix
from gulliver.compress.plan import Choice, planned, rows_of_classes
from gulliver.compress.statistics import CALIBRATION, Statistics, damage, open_statistics
from gulliver.core.artifact import Artifact
from gulliver.core.context import Context
from gulliver.core.errors import ConfigError
from gulliver.core.files import temporary_name, write_atomic
from gulliver.nets.weights import aliases, read_safetensors
from gulliver.runtime.packed import Format, PackedTensor
from gulliver.runtime.reference import PACKING, is_packed, packing_entry, packing_json, stored_form
from gulliver.tasks import get_task

DAMAGE = "damage.json"
"""In the artifact: {name: damage of this weight by the statistics, in the plan's unit}."""
SHARD_BYTES = 150_000_000
SMALL_GROUPS = 32


class Config(BaseModel):
    """Options of `quantize`. `bits`, `group_size` and `kind` are for a run without a plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(4, ge=2, le=8, description="bits of a code: 2, 3, 4, 5, 6 or 8; not used with a plan")
    group_size: int = Field(64, description="weights that share a scale: 32, 64 or 128; not used with a plan")
    kind: Literal["codebook", "uniform"] = Field(
        "codebook", description="values learned per tensor, or evenly spaced with a zero point; not used with a plan"
    )
    method: Literal["feedback", "nearest"] = Field(
        "feedback", description="feedback passes rounding errors on (GPTQ); nearest is the plain baseline"
    )
    max_ram_bytes: int | None = Field(None, ge=1, description="most resident memory of the process")


def run(cfg: Config, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """The packed model. ConfigError for a model that is packed already, BudgetError beyond the memory limit."""
    model, calibration, plan = inputs["model"], inputs["calibration"], inputs.get("plan")
    if is_packed(model.path):
        raise ConfigError(f"model {model.id[:12]} is packed already; quantize the model that it came from")
    statistics = open_statistics(calibration, model)
    fixed = None if plan is not None else Format(cfg.bits, cfg.group_size, cfg.kind)
    choices = planned(plan, statistics) if plan is not None else None
    empty = get_task(model.task).load(model.path, empty=True)
    canonical = {name: first for first, names in aliases(empty).items() for name in names}
    names = sorted(statistics.weights)
    with ctx.progress.stage("quantize", total=len(names), unit="weight") as bar:
        for index, name in enumerate(names):
            if not _file(ctx.work, index).is_file():
                choice = choices[name] if choices is not None else _whole(name, statistics, fixed)
                weight = _read(model.path, name, canonical)
                _pack(weight, name, choice, statistics, cfg, _file(ctx.work, index))
                check_ram(ctx, name)
            bar.advance(note=name)
    parents = [part.id for part in (model, calibration, plan) if part is not None]
    with ctx.writer(kind="model", task=model.task, parents=parents, step_name="quantize", config=cfg) as writer:
        entries = assemble(writer.path, model, canonical, {name: _file(ctx.work, i) for i, name in enumerate(names)})
        write_atomic(writer.path / PACKING, packing_json({name: row["packing"] for name, row in entries.items()}))
        hurt = {name: row["damage"] for name, row in entries.items()}
        write_atomic(writer.path / DAMAGE, json.dumps(hurt, sort_keys=True, indent=1) + "\n")
        shutil.copyfile(calibration.file(CALIBRATION), writer.path / CALIBRATION)
        copy_beside(model, writer.path)
        return writer.commit()


def _whole(name: str, statistics: Statistics, fixed: Format | None) -> Choice:
    assert fixed is not None
    return Choice(((statistics.weights[name].shape[0], fixed),))


def _read(folder: Path, name: str, canonical: Mapping[str, str]) -> Tensor:
    """One weight of a plain folder, float32, under whichever of its names it stands."""
    for _, tensor in read_safetensors(folder, torch.float32, only=lambda stored: canonical.get(stored) == name):
        return tensor
    raise ConfigError(f"{folder} holds no weights for {name}; quantize a plain model as `gulliver pull` makes it")


def _pack(weight: Tensor, name: str, choice: Choice, statistics: Statistics, cfg: Config, path: Path) -> None:
    """Quantize one weight and leave it, as stored, with its damage and its packing row in `path`."""
    matrix = weight.flatten(1)
    parts, row_part = [], None
    views = statistics.views(name)
    classes = rows_of_classes(views, matrix, [count for count, _ in choice.parts])
    if len(classes) > 1:
        row_part = torch.empty(len(matrix), dtype=torch.uint8)
        for index, rows in enumerate(classes):
            row_part[rows] = index
    moment = statistics.moment(name)
    for rows, (_, fmt) in zip(classes, choice.parts, strict=True):
        chosen = matrix if row_part is None else matrix[rows]
        parts.append(quantize_matrix(chosen, fmt, moment, feedback=cfg.method == "feedback").part)
    packed = PackedTensor(tuple(weight.shape), parts, row_part)
    hurt = float(damage(matrix, packed.dequantize().flatten(1), views).sum())
    facts = json.dumps({"packing": packing_entry(packed), "damage": hurt})
    temporary = temporary_name(path)
    save_file(stored_form(name, packed), str(temporary), metadata={"facts": facts})
    temporary.rename(path)


def assemble(
    folder: Path, model: Artifact, canonical: Mapping[str, str], files: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """Write the weight files of a packed model from one file per packed weight, and what stays plain.

    Returns the facts of each packed weight. What stays plain has 16 bits at most.
    """
    from safetensors import safe_open

    entries: dict[str, dict[str, Any]] = {}
    with ShardWriter(folder, SHARD_BYTES) as shards:
        for name, path in files.items():
            with safe_open(path, framework="pt") as opened:
                entries[name] = json.loads(opened.metadata()["facts"])
            shards.add(load_file(path))
        for name, tensor in plain_tensors(model.path, canonical, files):
            shards.add({name: tensor})
    return entries


def plain_tensors(
    folder: Path, canonical: Mapping[str, str], packed: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """What is not packed, each tied tensor once and under its first name; float32 becomes float16 where it fits."""
    seen: set[str] = set()
    for stored, tensor in read_safetensors(folder, only=lambda stored: canonical.get(stored, stored) not in packed):
        name = canonical.get(stored, stored)
        if name in seen:
            continue
        seen.add(name)
        yield name, narrow(tensor)


def narrow(tensor: Tensor) -> Tensor:
    """A float32 tensor as float16 unless it holds values beyond float16's range; any other tensor as it is."""
    if tensor.dtype != torch.float32 or not bool((tensor.abs() < 65_504.0).all()):
        return tensor
    return tensor.to(torch.float16)


def copy_beside(model: Artifact, folder: Path) -> None:
    """Copy what travels with the weights: config, tokenizer, and the like."""
    skipped = (PACKING, DAMAGE, CALIBRATION, "origin.json", "training.json", "healing.json")
    for name in model.files:
        if name.endswith((".safetensors", ".safetensors.index.json")) or name in skipped:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.file(name), folder / name)


def _file(work: Path, index: int) -> Path:
    return work / f"weight-{index:05}.safetensors"
