"""Step `distill`: distil a packed model against its parent, so that what rounding broke is made good where it matters.

Every packed weight becomes latent values and trainable scales (learning/latent.py); these and the vectors that are not
packed (norms, biases) follow the gradient of the task's divergence from the parent on calibration data, in the one
training loop. Formats and sizes stay as they are. Distillation on data is quantization-aware training with the parent
as teacher (LLM-QAT, 2023, arXiv 2305.17888); codes move only where the latent crosses a border, which learns rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from gulliver.core import memory
from gulliver.core.context import Context
from gulliver.core.errors import BudgetError, ConfigError
from gulliver.core.overlap import fingerprints
from gulliver.core.records import NOT_COPIED, Calibration, Distillation, LossIncrease, Packing
from gulliver.core.store.artifact import Artifact
from gulliver.learning.batches import in_turns
from gulliver.learning.latent import LatentTensor, Rounded
from gulliver.learning.loop import run_loop
from gulliver.learning.optim import OptimizerConfig
from gulliver.learning.schedule import Schedule
from gulliver.nets.files import copy_companions
from gulliver.nets.weights import aliases, owners
from gulliver.runtime.packed import PackedTensor
from gulliver.runtime.packing import is_packed
from gulliver.runtime.reference import packing_entry, read_stored, stored_form
from gulliver.runtime.shards import PACKED_SHARD_BYTES, ShardWriter
from gulliver.tasks import get_task, same_examples
from gulliver.tasks.base import Batch, Task
from gulliver.train.options import DistillOptions

COPIES = 7
"""float32 copies of all weights in memory: parent, model, latent, gradient, two moments, and what is in flight."""
BATCH_BYTES = 2_000_000_000
TURNS = (0, 1, 1, 1)
"""Whose batch is next: 0 the user's data, 1 the parent's own. A model comes to favour what it is distilled on."""


def run(cfg: DistillOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """The distilled model, packed in the same formats. ConfigError for a model that is not packed."""
    model, parent, datasets = inputs["model"], inputs["parent"], [inputs["dataset"]]
    if not is_packed(model.path):
        raise ConfigError(f"model {model.id[:12]} has no packed weights; `gulliver quantize` it first")
    if parent.task != model.task or not same_examples(datasets[0].task, model.task):
        raise ConfigError(f"model, parent and dataset must all be for {model.task}")
    datasets += [inputs["samples"]] if "samples" in inputs else []
    task = get_task(model.task)
    _refuse_too_large(parent, ctx)
    teacher = task.load(parent.path).requires_grad_(False)
    student = task.load(model.path).requires_grad_(False)
    latents, vectors = _trainable(student, teacher, model)
    batch_at = _batches(task, cfg, datasets, model, ctx)

    bfloat16 = torch.autocast("cpu", dtype=torch.bfloat16)
    loss = bfloat16(lambda index: task.loss(_use(student, latents), batch_at(index), teacher))
    parts = [part for latent in latents.values() for part in latent.parts]
    result = run_loop(
        parameters=[
            *({"params": [part.latent], "learning_rate": cfg.learning_rate * part.spacing()} for part in parts),
            {"params": [part.change for part in parts], "learning_rate": cfg.scale_rate},
            {"params": list(vectors.values()), "learning_rate": cfg.vector_rate},
        ],
        loss=loss,
        steps=cfg.steps,
        optimizer=OptimizerConfig("adamw", cfg.learning_rate),
        schedule=Schedule(cfg.warmup_steps),
        max_grad_norm=cfg.max_grad_norm,
        checkpoint=ctx.work / "loop.safetensors",
        checkpoint_every=cfg.checkpoint_every,
        progress=ctx.progress,
        stage="distill",
    )
    with ctx.writer(kind="model", task=model.task, config=cfg) as writer:
        entries = {}
        with ShardWriter(writer.path, PACKED_SHARD_BYTES) as shards:
            for name, tensor in read_stored(model.path):
                if isinstance(tensor, PackedTensor):
                    packed = latents[name].packed()
                    entries[name] = packing_entry(packed)
                    shards.add(stored_form(name, packed))
                else:
                    shards.add({name: vectors[name].detach().to(tensor.dtype) if name in vectors else tensor})
        Packing(tensors=entries).write(writer.path)
        Distillation(losses=tuple(result.losses)).write(writer.path)
        known = fingerprints(unit for part in datasets for unit in task.units_of(part.path, "train"))
        Calibration(dataset=datasets[0].id, fingerprints=tuple(known)).write(writer.path)
        copy_companions(model.paths(), writer.path, NOT_COPIED)
        if LossIncrease.name_in(model.files):
            LossIncrease.of(model).write(writer.path)
        return writer.commit()


def _refuse_too_large(parent: Artifact, ctx: Context) -> None:
    needed = memory.current_rss_bytes() + COPIES * 2 * parent.weight_bytes + BATCH_BYTES
    if ctx.max_ram_bytes is not None and needed > ctx.max_ram_bytes:
        raise BudgetError(
            f"distilling this model takes about {needed / 1e9:.1f} GB of memory; the limit is "
            f"{ctx.max_ram_bytes / 1e9:.1f} GB. Raise it, or fit with --effort normal, which does not distill"
        )


def _trainable(
    student: nn.Module, teacher: nn.Module, model: Artifact
) -> tuple[dict[str, LatentTensor], dict[str, nn.Parameter]]:
    """Latents of the packed weights, taken out of the network's parameters; and the vectors, which stay there."""
    parents = dict(teacher.named_parameters())
    latents = {
        name: LatentTensor(tensor, parents[name].detach())
        for name, tensor in read_stored(model.path)
        if isinstance(tensor, PackedTensor)
    }
    vectors = {
        name: parameter
        for name, parameter in student.named_parameters()
        if name not in latents and parameter.dim() == 1
    }
    for parameter in vectors.values():
        parameter.requires_grad_(True)
    shared = {name: owners(student, name) for name in latents}
    for pairs in shared.values():
        for _, module in pairs:
            del module._parameters["weight"]
    student.__dict__["latent_owners"] = {name: [module for _, module in pairs] for name, pairs in shared.items()}
    assert set(parents) == set(aliases(teacher)), "a parent's parameters are named by their first names"
    return latents, vectors


def _use(student: nn.Module, latents: dict[str, LatentTensor]) -> nn.Module:
    """Give the network the weights that the latents have come to stand for; returns it."""
    for name, latent in latents.items():
        value = latent.joined(
            [Rounded.apply(part.latent, part.change, part.scale, part.grid) for part in latent.parts]  # type: ignore[misc]
        )
        for module in student.__dict__["latent_owners"][name]:
            module.__dict__["weight"] = value
    return student


def _batches(
    task: Task, cfg: DistillOptions, datasets: list[Artifact], model: Artifact, ctx: Context
) -> Callable[[int], Batch]:
    """Batch k, from the data sets in the order of `TURNS`."""
    options = task.chosen(cfg.family)

    def stream(dataset: Artifact, step: int) -> Iterator[Batch]:
        return task.batches(dataset, "train", cfg.batch_size, ctx.seed + 1, step, folder=model.path, options=options)

    return in_turns(
        [partial(stream, dataset) for dataset in datasets], [turn for turn in TURNS if turn < len(datasets)]
    )
