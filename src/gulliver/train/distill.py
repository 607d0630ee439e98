"""Step `distill`: train a model, packed or dense, to answer like its parent.

Parameters follow the gradient of the task's divergence from the parent on calibration data (Distilling the knowledge in
a neural network, 2015, arXiv 1503.02531), in the one training loop. A packed model keeps its formats and sizes: its
weights become latent values and trainable scales (learning/latent.py), trained with the vectors that are not packed
(norms, biases); codes move only where a latent crosses a border, which learns rounding (LLM-QAT, 2023, arXiv
2305.17888). A dense model keeps its dtypes and is trained whole, each matrix at a rate relative to its root mean square
(Adafactor, 2018, arXiv 1804.04235), so that one rate suits every width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gulliver.core.context import Context
from gulliver.core.errors import FOREIGN, BudgetError, ConfigError
from gulliver.core.records import NOT_COPIED, Distillation, LossIncrease, PackedWeight, Packing
from gulliver.core.store.artifact import Artifact
from gulliver.learning.batches import in_turns
from gulliver.learning.clip import Clipping
from gulliver.learning.latent import LatentTensor
from gulliver.learning.loop import LoopConfig, run_loop
from gulliver.learning.optim import OptimizerConfig
from gulliver.learning.schedule import Schedule
from gulliver.nets.files import copy_companions
from gulliver.nets.precision import attempts, products_in
from gulliver.nets.weights import canonical_names, owners
from gulliver.runtime.packed import PackedTensor
from gulliver.runtime.packing import is_compressed
from gulliver.runtime.reference import packing_entry, read_stored, stored_form
from gulliver.runtime.shards import PACKED_SHARD_BYTES, SHARD_BYTES, ShardWriter
from gulliver.tasks import family, get_task, same_examples
from gulliver.tasks.base import Batch, Task
from gulliver.tasks.remembered import calibration_of
from gulliver.train.options import DistillOptions

COPIES = 6
"""float32 copies of the student in memory: model, latent, gradient, two moments, and what is in flight."""
ROOM_BYTES = 2_500_000_000
"""Memory for the process and one batch, forward and backward, beside the weights."""
TURNS = (0, 1)
"""Whose batch is next: 0 the user's data, 1 the parent's own. A model comes to favour what it is distilled on."""
LEAST_RMS = 1e-3
"""A matrix of smaller values is trained as if this were their root mean square."""


def run(cfg: DistillOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """The distilled model, packed in the same formats or dense in the same dtypes.

    ConfigError for a model that does not read and answer like its parent, BudgetError beyond the memory limit.
    """
    model, parent = inputs["model"], inputs["parent"]
    datasets = [inputs[role] for role in ("dataset", "samples") if role in inputs]
    task = get_task(model.task)
    _refuse_other(task, model, parent, datasets, ctx)
    batch_at = _batches(task, cfg, datasets, model, ctx)
    if not (_reader(model) and _reader(model) == _reader(parent)):
        ours, theirs = batch_at(0), _batches(task, cfg, datasets, parent, ctx)(0)
        if any(not torch.equal(tensor, theirs[name]) for name, tensor in ours.items()):
            told = f"model {model.id[:12]} and its parent {parent.id[:12]} turn the same text into different tokens"
            raise ConfigError(f"{told}; take a model with the parent's tokenizer")
    teacher = task.load(parent.path).requires_grad_(False)
    student = task.load(model.path).requires_grad_(False)
    canonical = canonical_names(student)
    quantized_from = any(parent.id in ids for ids in model.inputs.values())
    latents, dense = _trainable(student, teacher if quantized_from else None, model)

    checkpoint = ctx.work / "loop.safetensors"
    assert cfg.learning_rate is not None, "a call resolves it"
    config = LoopConfig(
        steps=cfg.steps,
        optimizer=OptimizerConfig("adamw", cfg.learning_rate),
        schedule=Schedule(cfg.warmup_steps),
        clipping=Clipping("norm", cfg.max_grad_norm),
    )

    for half in attempts():
        try:
            result = run_loop(
                parameters=_groups(cfg, cfg.learning_rate, latents, list(dense.values())),
                loss=products_in(half)(
                    lambda index: (
                        task.loss(_use(student, latents), batch := batch_at(index), teacher),
                        task.positions(batch),
                    )
                ),
                config=config,
                checkpoint=checkpoint,
                checkpoint_every=cfg.checkpoint_every,
                progress=ctx.progress,
                stage="distill",
            )
            break
        except FOREIGN:  # some networks mix types that do not go together: their first step fails
            if not half or checkpoint.exists():
                raise
    with ctx.writer(kind="model", task=model.task, config=cfg) as writer:
        entries = _write(writer.path, model, student, latents, dense, canonical)
        if is_compressed(model.path):
            Packing(tensors=entries).write(writer.path)
        Distillation(losses=tuple(result.losses)).write(writer.path)
        calibration_of(task, datasets).write(writer.path)
        copy_companions(model.paths(), writer.path, NOT_COPIED)
        if LossIncrease.name_in(model.files):
            LossIncrease.of(model).write(writer.path)
        return writer.commit()


def _write(
    folder: Path,
    model: Artifact,
    student: nn.Module,
    latents: Mapping[str, LatentTensor],
    dense: Mapping[str, Tensor],
    canonical: Mapping[str, str],
) -> dict[str, PackedWeight]:
    """Write the trained weights, each as the model stores it; returns what is packed."""
    entries, shard_bytes = {}, PACKED_SHARD_BYTES if is_compressed(model.path) else SHARD_BYTES
    with ShardWriter(folder, shard_bytes) as shards:
        for name, tensor in read_stored(model.path):
            trained = dense.get(canonical.get(name, name))
            if name not in latents and isinstance(tensor, PackedTensor):
                shards.add({name: student.get_parameter(name).detach().to(torch.bfloat16)})
            elif isinstance(tensor, PackedTensor):
                now = latents[name].packed()
                entries[name] = packing_entry(now)
                shards.add(stored_form(name, now))
            else:
                shards.add({name: tensor if trained is None else trained.detach().to(tensor.dtype)})
    return entries


# ---- what is refused ------------------------------------------------------------------------------------------------
def _refuse_other(task: Task, model: Artifact, parent: Artifact, datasets: list[Artifact], ctx: Context) -> None:
    """ConfigError for inputs of other families or answers, BudgetError for networks too large for the limit."""
    odd = [one for one in datasets if not same_examples(one.task, model.task)]
    for other in [parent, *odd] if parent.task != model.task else odd:
        told = f"{other.kind} {other.id[:12]} is for {other.task}"
        raise ConfigError(f"model, parent and dataset must all be for {model.task}, but {told}")
    ours, theirs = (task.load(one.path, empty=True) for one in (model, parent))
    for key in family(model.task).alike:
        mine, wanted = getattr(ours.config, key), getattr(theirs.config, key)
        if mine != wanted:
            raise ConfigError(
                f"{key} is {mine} in model {model.id[:12]} and {wanted} in its parent {parent.id[:12]}; "
                f"take a model with {wanted}, or a parent with {mine}"
            )
    weights = [sum(parameter.numel() for parameter in network.parameters()) for network in (ours, theirs)]
    needed = 4 * (COPIES * weights[0] + weights[1]) + ROOM_BYTES
    if ctx.max_ram_bytes is not None and needed > ctx.max_ram_bytes:
        raise BudgetError(
            f"distilling this model takes about {needed / 1e9:.1f} GB of memory; the limit is "
            f"{ctx.max_ram_bytes / 1e9:.1f} GB. Raise it, or fit with --effort normal, which does not distill"
        )


def _reader(model: Artifact) -> dict[str, Any]:
    """The files that turn text into tokens, with their hashes."""
    kinds = ("token", "vocab", "merges", ".model")
    return {name: entry for name, entry in model.files.items() if any(kind in name for kind in kinds)}


# ---- what is trained ------------------------------------------------------------------------------------------------
def _trainable(
    student: nn.Module, ancestor: nn.Module | None, model: Artifact
) -> tuple[dict[str, LatentTensor], dict[str, nn.Parameter]]:
    """Latents of the packed weights, taken out of the network's parameters; and what is trained as it is.

    That is all of a dense student, and the vectors of a packed one. Latents start at the weights of the `ancestor` that
    the student was quantized from, else at what is stored.
    """
    theirs = dict(ancestor.named_parameters()) if ancestor is not None else {}
    latents = {}
    for name, tensor in read_stored(model.path) if is_compressed(model.path) else ():
        if isinstance(tensor, PackedTensor):
            known = name in theirs and theirs[name].shape == tensor.shape
            latents[name] = LatentTensor(tensor, theirs[name].detach() if known else tensor.dequantize())
    dense = {}
    for name, parameter in student.named_parameters():
        if name not in latents and (parameter.dim() == 1 or not latents):
            dense[name] = parameter
            parameter.requires_grad_(True)
    users = {name: [(alias.rpartition(".")[2], module) for alias, module in owners(student, name)] for name in latents}
    for leaf, module in (pair for pairs in users.values() for pair in pairs):
        del module._parameters[leaf]
    student.__dict__["latent_owners"] = users
    return latents, dense


def _groups(
    cfg: DistillOptions, rate: float, latents: dict[str, LatentTensor], dense: list[nn.Parameter]
) -> list[dict[str, Any]]:
    """What the optimizer is given: each matrix with a rate of its own, then scales, then vectors."""
    parts = [part for latent in latents.values() for part in latent.parts]
    groups = [{"params": [part.latent], "learning_rate": rate * part.spacing()} for part in parts]
    for matrix in (one for one in dense if one.dim() > 1):
        size = max(float(matrix.detach().square().mean().sqrt()), LEAST_RMS)
        rounded = float(
            f"{rate * size:.4g}"
        )  # the mean's last bits depend on the threads, and a resumed run must agree
        groups.append({"params": [matrix], "learning_rate": rounded})
    scales, vectors = [part.change for part in parts], [one for one in dense if one.dim() <= 1]
    groups.append({"params": scales, "learning_rate": cfg.scale_rate})
    return [*groups, {"params": vectors, "learning_rate": cfg.vector_rate}]


def _use(student: nn.Module, latents: dict[str, LatentTensor]) -> nn.Module:
    """Give the network the weights that the latents have come to stand for; returns it."""
    for name, latent in latents.items():
        value = latent.value()
        for leaf, module in student.__dict__["latent_owners"][name]:
            module.__dict__[leaf] = value
    return student


def _batches(
    task: Task, cfg: DistillOptions, datasets: list[Artifact], reader: Artifact, ctx: Context
) -> Callable[[int], Batch]:
    """Batch k, from the data sets in the order of `TURNS`, as the model `reader` reads them."""
    options = task.chosen(cfg.family)

    def stream(dataset: Artifact, step: int) -> Iterator[Batch]:
        return task.batches(dataset, "train", cfg.batch_size, ctx.seed + 1, step, folder=reader.path, options=options)

    turns = [turn for turn in TURNS if turn < len(datasets)]
    return in_turns([partial(stream, dataset) for dataset in datasets], turns)
