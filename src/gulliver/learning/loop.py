"""The only training loop. Training, distillation and hardening differ in the loss they hand it, not in the loop.

For step t of T:  losses of `accumulate` micro-batches -> gradient of Σ loss / Σ trained positions -> clip -> update at
the scheduled rate -> average -> evaluate. The loss is asked for micro-batch t * accumulate + k, and everything that
changes from step to step is in the checkpoint (learning/state.py); so a run that was killed ends bitwise where the
uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gulliver.core.errors import ConfigError
from gulliver.learning.average import Averaging
from gulliver.learning.checkpoint import open_checkpoint, save_checkpoint
from gulliver.learning.clip import Clipping
from gulliver.learning.evaluation import Evaluation, Losses, NotFinite, best, mean_loss, waited
from gulliver.learning.gradients import GradientHook, Gradients, not_finite
from gulliver.learning.groups import block_norms
from gulliver.learning.optim import OptimizerConfig
from gulliver.learning.schedule import Schedule
from gulliver.learning.state import History, RunState

MOST_NORMS = 200
"""How often the norms of blocks are taken in a run, at most."""


@dataclass(frozen=True)
class LoopConfig:
    """How a run is made; all of it decides the result. `steps` are updates, of `accumulate` micro-batches each."""

    steps: int
    optimizer: OptimizerConfig
    schedule: Schedule
    clipping: Clipping = field(default_factory=Clipping)
    accumulate: int = 1
    averaging: Averaging | None = None
    evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("accumulate", self.accumulate)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.schedule.name == "plateau" and self.evaluation is None:
            raise ConfigError("the schedule plateau needs evaluations; say how often to evaluate")

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be one of this run; as JSON."""
        rest = ("optimizer", "schedule", "clipping", "averaging")
        parts = {name: getattr(self, name) and asdict(getattr(self, name)) for name in rest}
        held = self.evaluation and {name: getattr(self.evaluation, name) for name in ("every", "patience", "keep")}
        return {"steps": self.steps, "accumulate": self.accumulate, "evaluation": held, **parts}


@dataclass(frozen=True)
class LoopResult:
    """`history` of every step, the `resumed_from` steps that were found in the checkpoint included.

    `kept_step`: after how many updates the weights that are now in place were reached; `stopped_early` by patience.
    """

    history: History
    resumed_from: int
    kept_step: int
    stopped_early: bool

    @property
    def losses(self) -> list[float]:
        """Mean loss of every step."""
        return self.history.losses


def run_loop(
    *,
    parameters: list[dict[str, Any]],
    loss: Callable[[int], Losses],
    config: LoopConfig,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    state: dict[str, Tensor] | None = None,
    blocks: dict[str, list[Tensor]] | None = None,
    gradient_hook: GradientHook | None = None,
    progress: Any = None,
    stage: str = "train",
    after_step: Callable[[int], None] | None = None,
) -> LoopResult:
    """Train `parameters` in place by `config`, resuming from the file `checkpoint` when it exists.

    `parameters`: groups {"params": [...], "learning_rate"?, "weight_decay"?, "orthogonal"?}; all of them are saved and
    restored. `loss(index)`: (a mean loss per example [examples], how many positions each is the mean over) for
    micro-batch `index` in 0 ... steps * accumulate - 1; it must depend on `index`, `parameters` and `state` alone.
    `state`: further tensors that change during the run (running statistics), saved and restored in place. `blocks`:
    parameters by block, whose norms are noted. `gradient_hook` sees each micro-batch's gradients before they are added.
    `after_step(step)` is called after the update of 0-based `step` and before its checkpoint. The last step is saved
    too, so a kill after it repeats nothing. ConfigError for a checkpoint of another run, GulliverError when a loss or
    gradient is not finite: the checkpoint then still holds the last good step.
    """
    if checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every is {checkpoint_every}; it must be at least 1")
    run = RunState(parameters, config.optimizer, state or {}, config.averaging)
    identity = {**config.identity(), **run.shapes()}
    if found := open_checkpoint(checkpoint) if checkpoint else None:
        run.restore(found, identity)
    gradients = Gradients(run.tensors, config.accumulate, gradient_hook)
    start, saved = len(run.history.losses), checkpoint if found else None
    with nullcontext() if progress is None else progress.stage(stage, total=config.steps - start, unit="step") as bar:
        for step in range(start, config.steps):
            if _stops(config, run.history):
                break
            _schedule(run, config, step)
            for index in range(step * config.accumulate, (step + 1) * config.accumulate):
                gradients.add(loss(index), step, index, saved)
            mean = gradients.mean(step)
            _update(run, *gradients.take(), step, config, blocks or {}, saved)
            run.history.losses.append(mean)
            last = step + 1 == config.steps
            if config.evaluation is not None and ((step + 1) % config.evaluation.every == 0 or last):
                _evaluate(run, config.evaluation, step, saved)
                last = last or _stops(config, run.history)
            if after_step is not None:
                after_step(step)
            if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or last):
                save_checkpoint(checkpoint, run.content(), run.meta(identity))
                saved = checkpoint
            if bar is not None:
                bar.advance(note=f"loss {mean:.4g}")
    return _finished(run, config, start)


def _finished(run: RunState, config: LoopConfig, start: int) -> LoopResult:
    """Put the weights that are kept in place, and say which they are."""
    done = len(run.history.losses)
    run.finish(done - 1)
    top = best(run.history.evaluations) if run.best else None
    return LoopResult(run.history, start, done if top is None else top.step, done < config.steps)


def _stops(config: LoopConfig, history: History) -> bool:
    """Whether patience is at its end."""
    patience = None if config.evaluation is None else config.evaluation.patience
    return patience is not None and waited(history.evaluations) >= patience


def _schedule(run: RunState, config: LoopConfig, step: int) -> None:
    """Set the rate and the momentum of every group for this step."""
    factor = config.schedule.factor(step, config.steps, run.history.held_out)
    momentum = config.schedule.momentum(step, config.steps)
    for group in run.updater.param_groups:
        group["lr"] = group["initial_lr"] * factor
        group["momentum"] = group["momentum"] if momentum is None else momentum
    run.history.rates.append(config.optimizer.learning_rate * factor)


def _update(
    run: RunState,
    gradients: dict[Tensor, Tensor],
    positions: int,
    step: int,
    config: LoopConfig,
    blocks: dict[str, list[Tensor]],
    saved: Path | None,
) -> None:
    """Divide by the trained positions, clip, update, average, and note norms."""
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values()))) / positions
    if not math.isfinite(norm):
        first, end = step * config.accumulate, (step + 1) * config.accumulate
        batch = first if end - first == 1 else f"{first} to {end - 1}"
        raise not_finite(f"the gradient's norm is {norm}", step, batch, saved)
    noted = blocks and step % math.ceil(config.steps / MOST_NORMS) == 0
    if noted:
        run.history.norm_steps.append(step)
        run.history.gradient_norms.append([one / positions for one in block_norms(blocks, gradients)])
    run.history.clipped.append(config.clipping.apply(gradients, norm, 1 / positions))
    run.updater.step(gradients)
    if noted:
        run.history.weight_norms.append(block_norms(blocks, {one: one.detach() for one in run.tensors}))
    if run.average is not None:
        run.average.update(step)


def _evaluate(run: RunState, evaluation: Evaluation, step: int, saved: Path | None) -> None:
    """Measure the weights that would be kept, and keep them if they are the best; draws no random number."""
    devices = sorted({tensor.device.index for tensor in run.tensors if tensor.device.type == "cuda"})
    with run.candidate(step), torch.random.fork_rng(devices):
        try:
            found = mean_loss(evaluation.measure(), step + 1)
        except NotFinite as error:
            raise not_finite(f"the held-out loss is {error}", step, "of held-out data", saved) from None
        run.history.evaluations.append(found)
        if evaluation.keep == "best" and best(run.history.evaluations) is found:
            run.keep_as_best()
