"""Step `calibrate`: stream calibration data through a model, one block's weights in memory at a time.

For each weight that may be packed it keeps the second moment of its inputs and how much its outputs matter to the loss
(compress/statistics.py). Activations between blocks lie in files, so memory holds one block, one batch and one block's
moments whatever the model's size, and a killed run resumes at the block where it stopped. How much outputs matter is
measured by one backward pass where the whole model fits the memory limit; where it does not, outputs count by the
inverse of their own power, so that errors are relative.
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
from gulliver.nets.weights import assign, canonical_names, owners, read_safetensors, release, unfilled
from gulliver.runtime.packing import is_packed
from gulliver.tasks import get_task, same_examples
from gulliver.tasks.base import Batch, Block, Task

SENSITIVITY = "sensitivity.safetensors"


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
    chosen = _sensitivity(cfg, task, model, blocks, batches, ctx)
    with torch.no_grad():
        _stream(network, model, blocks, batches, cfg, ctx)
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
    cfg: CalibrateOptions, task: Task, model: Artifact, blocks: list[Block], batches: list[Batch], ctx: Context
) -> dict[str, Tensor] | None:
    """Squared output gradients by the name of each module's weight; None when outputs count by their power."""
    if cfg.sensitivity == "power":
        return None
    path = ctx.work / SENSITIVITY
    if path.is_file():
        return load_file(path)
    whole = task.load(model.path)
    watched = [pair for block in blocks for weight in block.weights for pair in owners(whole, weight.name)]
    some = batches[: -(-cfg.gradient_examples // cfg.batch_size)]
    with ctx.progress.stage("sensitivity", total=len(some), unit="batch") as bar:
        with output_gradients(whole, watched) as sums:
            for batch in some:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = task.loss(whole, batch).sum()
                loss.backward()
                bar.advance()
        examples = sum(next(iter(batch.values())).shape[0] for batch in some)
        found = {name: total / examples for name, total in sums.items()}
    ctx.check_ram('the backward pass (sensitivity = "power" does without it)')
    _save(found, path)
    return found


# ---- streaming ------------------------------------------------------------------------------------------------------
def _stream(
    network: nn.Module, model: Artifact, blocks: list[Block], batches: list[Batch], cfg: CalibrateOptions, ctx: Context
) -> None:
    """Leave `block-NNNN.safetensors` in the scratch folder for every block, resuming after the last one there."""
    watched = [pair for block in blocks for weight in block.weights for pair in owners(network, weight.name)]
    done = [number for number in range(len(blocks)) if _after(ctx.work, number).is_dir()]
    start = done[-1] + 1 if done else 0
    for stale in ctx.work.glob("*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink()
    with ctx.progress.stage("calibrate", total=len(blocks) - start, unit="block") as bar:
        for number in range(start, len(blocks)):
            block = blocks[number]
            fill(network, model.path, block.prefixes)
            moments = Moments(watched, cfg.moments == "full")
            with torch.autocast("cpu", dtype=torch.bfloat16):  # a new one for each block: it keeps cast weights
                passed = _pass(block, batches, _after(ctx.work, number - 1) if number else None, moments, ctx.work)
            moments.close()
            release(network, block.prefixes)
            ctx.check_ram(block.name)
            _save(moments.stored(), ctx.work / f"block-{number:04}.safetensors")
            passed.rename(_after(ctx.work, number))
            shutil.rmtree(_after(ctx.work, number - 1), ignore_errors=True)
            bar.advance(note=block.name)


def fill(network: nn.Module, folder: Path, prefixes: tuple[str, ...]) -> None:
    """Give the network the weights under `prefixes` from a plain folder."""
    canonical = canonical_names(network)
    tensors = read_safetensors(folder, only=lambda name: canonical.get(name, name).startswith(prefixes))
    assign(network, tensors)
    missing = [name for name in unfilled(network) if name.startswith(prefixes)]
    if missing:
        raise ConfigError(
            f"{folder} holds no weights for {missing[0]}; calibrate a plain model as `gulliver pull` makes it"
        )


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
