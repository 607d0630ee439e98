"""Step `calibrate`: stream calibration data through a model, one block's weights in memory at a time.

For each weight that may be packed it keeps the second moment of its inputs and how much its outputs matter to the loss
(compress/statistics.py). Activations between blocks lie in files, so memory holds one block, one batch and one block's
moments whatever the model's size, and a killed run resumes at the block where it stopped. How much outputs matter is
measured by a backward pass through the same blocks in reverse, each run again from what entered it; outputs may also
count by the inverse of their own power, so that errors are relative. A network whose parts form no sequence is run
whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gulliver.compress.collect import Collector, leave
from gulliver.compress.observe import Moments, output_gradients
from gulliver.compress.options import CalibrateOptions
from gulliver.core.context import Context
from gulliver.core.errors import FOREIGN, ConfigError, DataError, first_line
from gulliver.core.records import StatisticsTable
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import temporary_name
from gulliver.nets.linear_kl import chunk_rows
from gulliver.nets.precision import attempts, products_in
from gulliver.runtime.packing import is_compressed
from gulliver.runtime.shards import save
from gulliver.runtime.streamed import filled, narrow_weights
from gulliver.tasks import get_task, same_examples
from gulliver.tasks.base import Batch, Block, Task
from gulliver.tasks.blocks import packed_names
from gulliver.tasks.remembered import calibration_of

BROAD_TURNS = 2
"""Batches of the broad set for each of the user's data."""

MOST_OUTPUTS = 8192
"""Most positions at which the network's own outputs, which are many, are computed; evenly spread ones of more."""

LOOKED_UP = 0.02
"""What it costs to look a parameter up, as a share of multiplying by it, about."""

TOLD = 8
"""Lines at most about weights that no data reached; the report lists them all."""


def run(cfg: CalibrateOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """A report with the statistics. BudgetError when the memory limit cannot be held, DataError for too few data."""
    model, dataset, samples = inputs["model"], inputs["dataset"], inputs.get("samples")
    if not same_examples(dataset.task, model.task):
        raise ConfigError(f"the model is for {model.task}, but the dataset is for {dataset.task}")
    if is_compressed(model.path):
        raise ConfigError(f"model {model.id[:12]} is packed already; calibrate the plain model that it came from")
    ctx.check_ram("the start")
    task = get_task(model.task)
    datasets, options = [part for part in (dataset, samples) if part], task.chosen(cfg.family)
    streams = [
        task.batches(part, "train", cfg.batch_size, ctx.seed, 0, folder=model.path, options=options)
        for part in datasets
    ]
    batches = [next(streams[_turn(index) % len(streams)]) for index in range(-(-cfg.examples // cfg.batch_size))]
    network, notes = task.load(model.path, empty=True), []
    some = batches[: -(-cfg.gradient_examples // cfg.batch_size)] if cfg.sensitivity == "gradient" else []
    blocks, chosen = _observe(network, task, model, batches, len(some), cfg, ctx, notes), None
    if some:
        try:
            chosen = _sensitivity(network, task, model, blocks, some, ctx)
        except FOREIGN as error:
            notes.append(f"outputs count by their power, because no gradient passes back: {first_line(error)}")
    with ctx.writer(kind="report", task=task.name, config=cfg) as writer:
        kept = Collector(network, chosen, ctx.work, writer.path).collect(blocks)
        if not kept.weights:
            raise DataError("no calibration data passed through any weight; nothing is known about them")
        StatisticsTable(
            model=model.id,
            weights=kept.weights,
            plain=kept.plain,
            unreached=kept.unreached,
            notes=tuple(notes),
            blocks=tuple(block.name for block in blocks),
            sensitivity=cfg.sensitivity,
            examples=sum(next(iter(batch.values())).shape[0] for batch in batches),
        ).write(writer.path)
        calibration_of(task, datasets).write(writer.path)
        for line in (*notes, *(f"{name}: {told}" for name, told in list(kept.unreached.items())[:TOLD])):
            ctx.progress.print(f"calibrate: {line}")
        return writer.commit()


def _turn(index: int) -> int:
    """Which data batch number `index` is of: 0, the user's, after every two of the broad set, 1."""
    return int(index % (BROAD_TURNS + 1) > 0)


def _observe(
    network: nn.Module,
    task: Task,
    model: Artifact,
    batches: list[Batch],
    kept: int,
    cfg: CalibrateOptions,
    ctx: Context,
    notes: list[str],
) -> list[Block]:
    """Stream, block by block or, where that does not work, whole, which `notes` gets a line about. Returns the blocks.

    What leaves each block stays in the scratch folder for the first `kept` batches.
    """
    for whole in (False, True):
        try:
            blocks = task.blocks(network, batches, whole=whole)
            with torch.no_grad():
                _stream(network, task, model, blocks, batches, cfg, ctx, kept)
            return blocks
        except (ConfigError, *FOREIGN) as error:
            if whole:
                raise ConfigError(f"this network cannot be calibrated: {first_line(error)}") from error
            notes.append(f"the network is run whole, because it cannot be run block by block: {first_line(error)}")
            for stale in ctx.work.iterdir():
                shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink()
    raise AssertionError("a network that cannot be run whole was refused")


# ---- how much outputs matter ----------------------------------------------------------------------------------------
def _sensitivity(
    network: nn.Module, task: Task, model: Artifact, blocks: list[Block], batches: list[Batch], ctx: Context
) -> dict[str, Tensor]:
    """Squared output gradients by the name of each module's weight, summed over positions, mean over examples.

    Times the number of positions, so that the loss increase that they predict is in nats for one position.
    Leaves `gradient-NNNN.safetensors` in the scratch folder for every block, from the last to the first, and resumes.
    """
    names, narrow = packed_names(blocks), narrow_weights(network)
    costs = _costs(network, blocks)[::-1]
    with ctx.progress.stage("sensitivity", total=len(blocks), unit="block", costs=costs) as bar:
        for number, block in reversed(list(enumerate(blocks))):
            path = ctx.work / f"gradient-{number:04}.safetensors"
            if not path.is_file():
                for half in attempts():
                    with filled(network, model.path, block.prefixes, narrow if half else ()):
                        weights = {name: network.get_parameter(name) for name in names}
                        try:
                            with output_gradients(network, weights) as sums, products_in(half):
                                _backward(network, task, blocks, number, batches, ctx.work)
                            break
                        except FOREIGN:  # some networks mix types that do not go together
                            if not half:
                                raise
                save(sums, path)
                ctx.check_ram(f"the backward pass of {block.name}")
                shutil.rmtree(_gradients(ctx.work, number), ignore_errors=True)
            bar.advance(note=block.name)
    examples = sum(next(iter(batch.values())).shape[0] for batch in batches)
    stored = (load_file(ctx.work / f"gradient-{number:04}.safetensors") for number in range(len(blocks)))
    scale = float(task.positions(batches[0]).double().mean()) / examples
    return {name: scale * total for sums in stored for name, total in sums.items()}


def _backward(
    network: nn.Module, task: Task, blocks: list[Block], number: int, batches: list[Batch], work: Path
) -> None:
    """Run all batches through block `number` again, and their gradients back; those at its inputs lie in a folder."""
    folder = temporary_name(work / "gradients")
    folder.mkdir()
    for index, batch in enumerate(batches):
        if len(blocks) == 1:
            blocks[0].forward(batch, index).sum().backward()
            continue
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
    task: Task,
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
    names, narrow = packed_names(blocks), narrow_weights(network)
    done = [number for number in range(len(blocks)) if _after(ctx.work, number).is_dir()]
    start = done[-1] + 1 if done else 0
    for stale in ctx.work.glob("*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink()
    costs = _costs(network, blocks)[start:]
    with ctx.progress.stage("calibrate", total=len(blocks) - start, unit="block", costs=costs) as bar:
        for number in range(start, len(blocks)):
            block = blocks[number]
            before = _after(ctx.work, number - 1) if number else None
            for half in attempts():
                with filled(network, model.path, block.prefixes, narrow if half else ()):
                    weights = {name: network.get_parameter(name) for name in names}
                    try:
                        with Moments(weights, cfg.moments == "full") as moments, products_in(half):
                            last = number + 1 == len(blocks)
                            passed = _pass(task, block, batches, before, moments, ctx.work, last=last)
                        break
                    except FOREIGN:  # some networks mix types that do not go together
                        if not half:
                            raise
            ctx.check_ram(block.name)
            leave(moments.stored(), ctx.work, number)
            passed.rename(_after(ctx.work, number))
            for index in range(kept, len(batches) if number else 0):
                (_after(ctx.work, number - 1) / f"{index}.safetensors").unlink(missing_ok=True)
            bar.advance(note=block.name)


def _costs(network: nn.Module, blocks: list[Block]) -> list[float]:
    """How long each block takes, in products: as many as it has parameters, but for the first, which looks them up."""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    products = [sum(size for name, size in sizes.items() if name.startswith(block.prefixes)) for block in blocks]
    return [products[0] * LOOKED_UP, *map(float, products[1:])]


def _pass(
    task: Task, block: Block, batches: list[Batch], before: Path | None, moments: Moments, work: Path, last: bool
) -> Path:
    """Run all batches through a block; returns a folder, not yet under its name, with the activations after it.

    What leaves the `last` one (logits, which are large) is not kept, nor ever whole: nothing reads it.
    """
    folder = temporary_name(work / "after")
    folder.mkdir()
    every = max(1, -(-sum(next(iter(batch.values())).numel() for batch in batches) // MOST_OUTPUTS))
    for index, batch in enumerate(batches):
        x: Any = batch if before is None else load_file(before / f"{index}.safetensors")["x"]
        if last and before is not None and block.pointwise:
            some = slice(every // 2, None, every)
            x, mask = x[:, some], None if "mask" not in batch else batch["mask"][:, some]
            step = max(1, chunk_rows(moments.widest) // len(x))
            for start in range(0, x.shape[1], step):
                moments.begin(None if mask is None else mask[:, start : start + step])
                moments.expect(task.expected(block.forward(x[:, start : start + step], index)))
            continue
        moments.begin(batch.get("mask"))
        output = block.forward(x, index)
        if not last:
            save_file({"x": output.float().contiguous()}, str(folder / f"{index}.safetensors"))
        del output
    return folder


def _after(work: Path, number: int) -> Path:
    return work / f"after-{number:04}"
