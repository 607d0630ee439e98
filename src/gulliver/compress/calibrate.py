"""Step `calibrate`: stream calibration data through a model, one block's weights in memory at a time.

For each weight that may be packed it keeps the second moment of its inputs and how much its outputs matter to the loss
(compress/statistics.py). Activations between blocks lie in files, so memory holds one block, one batch and one block's
moments whatever the model's size, and a killed run resumes at the block where it stopped. How much outputs matter is
measured by a backward pass through the same blocks in reverse, each run again from what entered it; outputs may also
count by the inverse of their own power, so that errors are relative.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gulliver.compress.observe import Moments, output_gradients
from gulliver.compress.options import CalibrateOptions
from gulliver.compress.statistics import ROWS
from gulliver.core.context import Context
from gulliver.core.errors import ConfigError, DataError
from gulliver.core.overlap import fingerprints
from gulliver.core.records import Calibration, StatisticsTable, WeightRow
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import temporary_name
from gulliver.nets.weights import owners
from gulliver.runtime.packing import is_packed
from gulliver.runtime.streamed import filled
from gulliver.tasks import get_task, same_examples
from gulliver.tasks.base import Batch, Block, Task


def run(cfg: CalibrateOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """A report with the statistics. BudgetError when the memory limit cannot be held, DataError for too few data."""
    model, dataset, samples = inputs["model"], inputs["dataset"], inputs.get("samples")
    if not same_examples(dataset.task, model.task):
        raise ConfigError(f"the model is for {model.task}, but the dataset is for {dataset.task}")
    if is_packed(model.path):
        raise ConfigError(f"model {model.id[:12]} is packed already; calibrate the plain model that it came from")
    ctx.check_ram("the start")
    task = get_task(model.task)
    datasets, options = [part for part in (dataset, samples) if part], task.chosen(cfg.family)
    streams = [
        task.batches(part, "train", cfg.batch_size, ctx.seed, 0, folder=model.path, options=options)
        for part in datasets
    ]
    batches = [next(streams[index % len(streams)]) for index in range(-(-cfg.examples // cfg.batch_size))]
    network = task.load(model.path, empty=True)
    blocks = task.blocks(network, batches)
    some = batches[: -(-cfg.gradient_examples // cfg.batch_size)] if cfg.sensitivity == "gradient" else []
    with torch.no_grad():
        _stream(network, model, blocks, batches, cfg, ctx, len(some))
    chosen = _sensitivity(network, task, model, blocks, some, ctx) if some else None
    known = fingerprints(unit for part in datasets for unit in task.units_of(part.path, "train"))
    with ctx.writer(kind="report", task=task.name, config=cfg) as writer:
        StatisticsTable(
            model=model.id,
            weights=_collect(network, blocks, chosen, ctx.work, writer.path),
            blocks=tuple(block.name for block in blocks),
            sensitivity=cfg.sensitivity,
            examples=sum(next(iter(batch.values())).shape[0] for batch in batches),
        ).write(writer.path)
        Calibration(dataset=dataset.id, fingerprints=tuple(known)).write(writer.path)
        return writer.commit()


# ---- how much outputs matter ----------------------------------------------------------------------------------------
def _sensitivity(
    network: nn.Module, task: Task, model: Artifact, blocks: list[Block], batches: list[Batch], ctx: Context
) -> dict[str, Tensor]:
    """Squared output gradients by the name of each module's weight, summed over positions, mean over examples.

    Leaves `gradient-NNNN.safetensors` in the scratch folder for every block, from the last to the first, and resumes.
    """
    watched, narrow = _watched(network, blocks), _narrow(blocks)
    with ctx.progress.stage("sensitivity", total=len(blocks), unit="block") as bar:
        for number, block in reversed(list(enumerate(blocks))):
            path = ctx.work / f"gradient-{number:04}.safetensors"
            if not path.is_file():
                with filled(network, model.path, block.prefixes, narrow), output_gradients(network, watched) as sums:
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        _backward(network, task, blocks, number, batches, ctx.work)
                    _save(sums, path)
                ctx.check_ram(f"the backward pass of {block.name}")
                shutil.rmtree(_gradients(ctx.work, number), ignore_errors=True)
            bar.advance(note=block.name)
    examples = sum(next(iter(batch.values())).shape[0] for batch in batches)
    stored = (load_file(ctx.work / f"gradient-{number:04}.safetensors") for number in range(len(blocks)))
    return {name: total / examples for sums in stored for name, total in sums.items()}


def _backward(
    network: nn.Module, task: Task, blocks: list[Block], number: int, batches: list[Batch], work: Path
) -> None:
    """Run all batches through block `number` again, and their gradients back; those at its inputs lie in a folder."""
    folder = temporary_name(work / "gradients")
    folder.mkdir()
    for index, batch in enumerate(batches):
        if number == 0:
            output = blocks[0].forward(batch, index)
            if output.requires_grad:
                output.backward(_gradient(work, 0, index).to(output.dtype))
            continue
        x = load_file(_after(work, number - 1) / f"{index}.safetensors")["x"]
        if number == len(blocks) - 1:
            gradient = task.backward(network, blocks[-1], x, index, batch)
        else:
            x.requires_grad_(True)
            output = blocks[number].forward(x, index)
            output.backward(_gradient(work, number, index).to(output.dtype))
            assert x.grad is not None
            gradient = x.grad
        save_file({"x": gradient}, str(folder / f"{index}.safetensors"))
    folder.rename(_gradients(work, number - 1)) if number else folder.rmdir()


def _gradients(work: Path, number: int) -> Path:
    """The folder of the gradients at what leaves block `number`."""
    return work / f"gradients-{number:04}"


def _gradient(work: Path, number: int, index: int) -> Tensor:
    return load_file(_gradients(work, number) / f"{index}.safetensors")["x"]


# ---- streaming ------------------------------------------------------------------------------------------------------
def _stream(
    network: nn.Module,
    model: Artifact,
    blocks: list[Block],
    batches: list[Batch],
    cfg: CalibrateOptions,
    ctx: Context,
    kept: int,
) -> None:
    """Leave `block-NNNN.safetensors` in the scratch folder for every block, resuming after the last one there.

    What leaves each block stays there for the first `kept` batches.
    """
    watched, narrow = _watched(network, blocks), _narrow(blocks)
    done = [number for number in range(len(blocks)) if _after(ctx.work, number).is_dir()]
    start = done[-1] + 1 if done else 0
    for stale in ctx.work.glob("*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink()
    with ctx.progress.stage("calibrate", total=len(blocks) - start, unit="block") as bar:
        for number in range(start, len(blocks)):
            block = blocks[number]
            moments = Moments(watched, cfg.moments == "full")
            with (
                filled(network, model.path, block.prefixes, narrow),
                torch.autocast("cpu", dtype=torch.bfloat16),  # a new one for each block: it keeps cast weights
            ):
                passed = _pass(block, batches, _after(ctx.work, number - 1) if number else None, moments, ctx.work)
            moments.close()
            ctx.check_ram(block.name)
            _save(moments.stored(), ctx.work / f"block-{number:04}.safetensors")
            passed.rename(_after(ctx.work, number))
            for index in range(kept, len(batches) if number else 0):
                (_after(ctx.work, number - 1) / f"{index}.safetensors").unlink(missing_ok=True)
            bar.advance(note=block.name)


def _watched(network: nn.Module, blocks: list[Block]) -> list[tuple[str, nn.Module]]:
    """(name of its weight, module) of every module that uses a weight that may be packed."""
    return [pair for block in blocks for weight in block.weights for pair in owners(network, weight.name)]


def _narrow(blocks: list[Block]) -> set[str]:
    return {weight.name for block in blocks for weight in block.weights}


def _pass(block: Block, batches: list[Batch], before: Path | None, moments: Moments, work: Path) -> Path:
    """Run all batches through a block; returns a folder, not yet under its name, with the activations after it."""
    folder = temporary_name(work / "after")
    folder.mkdir()
    for index, batch in enumerate(batches):
        moments.begin(batch)
        x = batch if before is None else load_file(before / f"{index}.safetensors")["x"]
        output = block.forward(x, index)
        save_file({"x": output.float().contiguous()}, str(folder / f"{index}.safetensors"))
    return folder


def _after(work: Path, number: int) -> Path:
    return work / f"after-{number:04}"


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    temporary = temporary_name(path)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary))
    temporary.rename(path)


# ---- what is kept ---------------------------------------------------------------------------------------------------
def _collect(
    network: nn.Module, blocks: list[Block], chosen: dict[str, Tensor] | None, work: Path, folder: Path
) -> dict[str, WeightRow]:
    """Move the blocks' moments into the artifact, write the row weights beside them; returns the rows of the table."""
    home: dict[str, tuple[str, str]] = {}
    found: dict[str, dict[str, Tensor]] = {"count": {}, "power": {}}
    for number in range(len(blocks)):
        path = work / f"block-{number:04}.safetensors"
        stored = load_file(path)
        for key, tensor in stored.items():
            kind, _, name = key.partition(":")
            if kind == "leader":
                leader, _, name = name.partition(":")
                home[name] = (path.name, f"moment:{leader}")
            elif kind in found:
                found[kind][name] = found[kind].get(name, 0) + (tensor.double() if kind == "power" else tensor)
        kept = {key: tensor for key, tensor in stored.items() if key.startswith("moment:")}
        if kept:
            _save(kept, folder / path.name)
    rows: dict[str, Tensor] = {}
    weights: dict[str, WeightRow] = {}
    for block in blocks:
        for weight in block.weights:
            shape = tuple(network.get_parameter(weight.name).shape)
            uses = []
            for name, module in owners(network, weight.name):
                table = isinstance(module, nn.Embedding)
                if name not in (found["count"] if table else home):
                    continue
                width = shape[1] if table else shape[0]
                if chosen is not None:
                    outputs = chosen.get(name, torch.zeros(width))
                else:
                    outputs = torch.full((width,), 1.0 / (width * max(float(found["power"].get(name, 0.0)), 1e-20)))
                if table:
                    counts = found["count"][name] + 0.5
                    rows |= {f"moment:{name}": outputs, f"rows:{name}": counts / counts.sum()}
                    uses.append((ROWS, f"moment:{name}", f"rows:{name}"))
                else:
                    rows[f"rows:{name}"] = outputs
                    uses.append((*home[name], f"rows:{name}"))
            if not uses:
                raise DataError(f"no calibration data passed through {weight.name}; nothing is known about it")
            weights[weight.name] = WeightRow(shape=shape, block=block.name, uses=tuple(uses))
    _save(rows, folder / ROWS)
    return weights
