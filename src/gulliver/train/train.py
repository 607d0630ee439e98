"""Step `train`: a fresh network of any family, from one size dial, trained on a dataset."""

from __future__ import annotations

from torch import Tensor, nn

from gulliver.core.context import Context
from gulliver.core.errors import ConfigError
from gulliver.core.records import Training
from gulliver.core.store.artifact import Artifact
from gulliver.learning.batches import in_turns
from gulliver.learning.loop import run_loop
from gulliver.learning.optim import OptimizerConfig, Schedule, parameter_groups
from gulliver.tasks import get_task, same_examples
from gulliver.tasks.remembered import calibration_of
from gulliver.train.options import TrainOptions


def run(cfg: TrainOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Train on `inputs["dataset"]` and return the model. A killed run ends with the same id as an uninterrupted one.

    ConfigError when the dataset is of another task, GulliverError when the loss stops being finite.
    """
    dataset = inputs["dataset"]
    task = get_task(cfg.task or dataset.task)
    if not same_examples(task.name, dataset.task):
        raise ConfigError(f"task is {task.name!r}, but the dataset is for {dataset.task!r}; leave task out")
    options = task.chosen(cfg.family)
    model = task.build(cfg.size, ctx.seed).train()
    folder = ctx.work / "fresh"
    task.save(model, folder)
    batch_at = in_turns(
        [lambda step: task.batches(dataset, "train", cfg.batch_size, ctx.seed, step, folder=folder, options=options)]
    )
    result = run_loop(
        parameters=parameter_groups(model, cfg.weight_decay),
        loss=lambda index: task.loss(model, batch_at(index)),
        steps=cfg.steps,
        optimizer=OptimizerConfig(cfg.optimizer, cfg.learning_rate, cfg.weight_decay),
        schedule=Schedule(cfg.warmup_steps),
        max_grad_norm=cfg.max_grad_norm,
        checkpoint=ctx.work / "loop.safetensors",
        checkpoint_every=cfg.checkpoint_every,
        state=_state(model),
        progress=ctx.progress,
        stage="train",
    )
    resolved = cfg.model_copy(update={"task": task.name})
    with ctx.writer(kind="model", task=task.name, config=resolved) as writer:
        task.save(model.eval(), writer.path)
        Training(losses=tuple(result.losses)).write(writer.path)
        calibration_of(task, [dataset]).write(writer.path)
        return writer.commit()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's weights, for example running statistics."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters}
