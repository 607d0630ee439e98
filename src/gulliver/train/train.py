"""Step `train`: a fresh network of any family, from one size dial, trained on a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gulliver.core.context import Context
from gulliver.core.errors import ConfigError
from gulliver.core.evidence.evidence import Evidence, measured
from gulliver.core.records import Training
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import write_atomic
from gulliver.core.training import BlockNorms, RateTest
from gulliver.learning.average import Averaging
from gulliver.learning.batches import in_turns
from gulliver.learning.clip import Clipping
from gulliver.learning.evaluation import Evaluation, Losses, best
from gulliver.learning.groups import Rates, blocks_of, parameter_groups, recompute_layers
from gulliver.learning.loop import LoopConfig, LoopResult, run_loop
from gulliver.learning.optim import BETA1, OptimizerConfig
from gulliver.learning.range_test import run_range_test
from gulliver.learning.schedule import Schedule
from gulliver.nets.precision import products_in
from gulliver.tasks import get_task, same_examples
from gulliver.tasks.base import Batch, Task
from gulliver.tasks.remembered import calibration_of
from gulliver.train.options import LIMITS, TrainOptions

FROM_TEST = "rates.json"
"""File in scratch: what the test of rates found, so that a run which was killed does not repeat it."""


def run(cfg: TrainOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Train on `inputs["dataset"]` and return the model. A killed run ends with the same id as an uninterrupted one.

    ConfigError when the dataset is of another task, GulliverError when the loss stops being finite.
    """
    dataset = inputs["dataset"]
    cfg = cfg.resolved(inputs)
    task = get_task(cfg.task or dataset.task)
    if not same_examples(task.name, dataset.task):
        raise ConfigError(f"task is {task.name!r}, but the dataset is for {dataset.task!r}; leave task out")
    options = task.chosen(cfg.family)
    model = _fresh(task, cfg, ctx.seed)
    folder = ctx.work / "fresh"
    task.save(model, folder)
    part = cfg.batch_size // cfg.accumulate
    batch_at = in_turns(
        [lambda step: task.batches(dataset, "train", part, ctx.seed, step, folder=folder, options=options)]
    )
    with torch.random.fork_rng():
        torch.manual_seed(ctx.seed)
        shared = {"folder": folder, "options": options, "once": True}
        held_out = task.batches(dataset, "eval", cfg.batch_size, ctx.seed, 0, **shared)
        batches = list(islice(held_out, cfg.evaluate_batches)) if cfg.evaluate_every else []
        test = _rate_test(task, cfg, batch_at, batches, ctx)
        rate = test.suggested if test is not None else float(cfg.learning_rate)
        config = _config(cfg, rate, _evaluation(task, cfg, model, batches))
        blocks = blocks_of(model)
        result = run_loop(
            parameters=_groups(model, cfg, config.optimizer),
            loss=_loss(task, cfg, model, batch_at),
            config=config,
            checkpoint=ctx.work / "loop.safetensors",
            checkpoint_every=cfg.checkpoint_every,
            state=_state(model),
            blocks=blocks,
            progress=ctx.progress,
            stage="train",
        )
    with ctx.writer(kind="model", task=task.name, config=cfg.model_copy(update={"learning_rate": rate})) as writer:
        task.save(model.eval(), writer.path)
        _record(result, config, tuple(blocks), test).write(writer.path)
        calibration_of(task, [dataset]).write(writer.path)
        made = writer.commit()
    if found := _decision(result, cfg, batches):
        ctx.record([one.filled(artifact_id=made.id) for one in found])
    return made


# ---- the network and what it learns from ----------------------------------------------------------------------------
def _fresh(task: Task, cfg: TrainOptions, seed: int) -> nn.Module:
    """The network in training mode, with what drops, softens, recomputes and stores in bfloat16."""
    model = task.build(cfg.size, seed).train()
    rules = {name: getattr(cfg, name) for name in ("dropout", "stochastic_depth", "label_smoothing")}
    task.regularize(model, **rules)
    if cfg.recompute:
        recompute_layers(model)
    if cfg.precision in ("stochastic", "compensated"):
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # vectors are few, and norms are computed in float32
                parameter.data = parameter.data.bfloat16()
    return model


def _loss(task: Task, cfg: TrainOptions, model: nn.Module, batch_at: Callable[[int], Batch]) -> Callable[[int], Losses]:
    """The losses of micro-batch k, and over how many positions each is the mean."""

    return products_in(cfg.precision != "float32")(
        lambda index: (task.loss(model, batch := batch_at(index)), task.positions(batch))
    )


def _evaluation(task: Task, cfg: TrainOptions, model: nn.Module, batches: list[Batch]) -> Evaluation | None:
    """How the held-out batches are measured; None where nothing is."""
    if not batches:
        return None

    def measure() -> Losses:
        model.eval()
        at = _loss(task, cfg, model, batches.__getitem__)
        with torch.no_grad():
            values, counts = zip(*map(at, range(len(batches))), strict=True)
        model.train()
        return torch.cat(values), torch.cat(counts)

    return Evaluation(measure, cfg.evaluate_every, cfg.patience, cfg.keep)


# ---- how it learns --------------------------------------------------------------------------------------------------
def _config(cfg: TrainOptions, rate: float, evaluation: Evaluation | None) -> LoopConfig:
    """What the options, resolved, ask of the loop."""
    limit = next(name for name in LIMITS if getattr(cfg, name) is not None)
    rounding = "stochastic" if cfg.precision == "stochastic" else "compensated"
    average = None
    if cfg.average != "none":
        average = Averaging(cfg.average, cfg.ema_decay or 0.0, cfg.average_from or 0)
    return LoopConfig(
        steps=cfg.steps,
        accumulate=cfg.accumulate,
        optimizer=OptimizerConfig(
            cfg.optimizer,
            rate,
            cfg.weight_decay,
            momentum=BETA1 if cfg.momentum is None else cfg.momentum,
            nesterov=cfg.nesterov,
            rounding=rounding,
        ),
        schedule=Schedule(
            cfg.warmup_steps, cfg.schedule, cfg.decay_steps or 0, cfg.plateau_patience or 1, cfg.plateau_shrink or 0.5
        ),
        clipping=Clipping(LIMITS[limit], getattr(cfg, limit)),  # type: ignore[arg-type]
        averaging=average,
        evaluation=evaluation,
    )


def _groups(model: nn.Module, cfg: TrainOptions, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    return parameter_groups(model, optimizer, Rates(cfg.layer_decay, cfg.edge_rate, cfg.vector_rate))


def _rate_test(
    task: Task, cfg: TrainOptions, batch_at: Callable[[int], Batch], batches: list[Batch], ctx: Context
) -> RateTest | None:
    """What a test of rates finds, on a network that is then thrown away; None where a rate is given."""
    path = ctx.work / FROM_TEST
    if cfg.learning_rate != "auto":
        return None
    if path.is_file():
        return RateTest.model_validate_json(path.read_bytes())
    batch_at(0)  # what is wrong with the data shows here
    model = _fresh(task, cfg, ctx.seed)
    config = _config(cfg, 1.0, _evaluation(task, cfg, model, batches))
    with torch.random.fork_rng():
        test = run_range_test(
            lambda rate: _groups(model, cfg, replace(config.optimizer, learning_rate=rate)),
            _loss(task, cfg, model, batch_at),
            config,
            ctx.progress,
        )
    write_atomic(path, test.model_dump_json())
    return test


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's weights, for example running statistics."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters}


# ---- what is remembered ---------------------------------------------------------------------------------------------
def _record(result: LoopResult, config: LoopConfig, blocks: tuple[str, ...], test: RateTest | None) -> Training:
    """The history of a run as the model's record."""
    history = result.history
    norms = BlockNorms(
        blocks=blocks,
        steps=tuple(history.norm_steps),
        gradients=tuple(map(tuple, history.gradient_norms)),
        weights=tuple(map(tuple, history.weight_norms)),
    )
    return Training(
        losses=tuple(history.losses),
        rates=tuple(history.rates),
        clipped=tuple(history.clipped),
        clipped_by=config.clipping.kind,
        held_out=tuple(history.evaluations),
        norms=norms,
        rate_test=test,
        kept_step=result.kept_step,
        stopped_early=result.stopped_early,
    )


def _decision(result: LoopResult, cfg: TrainOptions, batches: list[Batch]) -> list[Evidence]:
    """Which weights were kept and why, where held-out data decided; none where nothing was measured."""
    history = result.history
    kept = best(history.evaluations) if cfg.keep == "best" else next(reversed(history.evaluations), None)
    if kept is None:
        return []
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode() + batch[name].contiguous().view(torch.uint8).numpy().tobytes())
    why = "patience" if result.stopped_early else "all steps were done"
    rules = {"keep": cfg.keep, "patience": cfg.patience, "evaluate_every": cfg.evaluate_every, "average": cfg.average}
    detail = {"data": "held-out batches of the training", "ended": why, "updates": len(history.losses), **rules}
    half = float("inf") if kept.half_width is None else kept.half_width
    shared = {"n": kept.examples, "data_hash": digest.hexdigest(), "detail": detail}
    return [
        measured("selection_loss", kept.loss, kept.loss - half, kept.loss + half, **shared),
        measured("kept_step", result.kept_step, **shared),
    ]
