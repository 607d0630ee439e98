"""The only training loop. Training, distillation and hardening differ in the loss they hand it, not in the loop.

For step t of T:  loss of `accumulate` micro-batches -> gradient -> clip to `max_grad_norm` -> update at the scheduled
rate. The loss is asked for micro-batch t * accumulate + k, and everything that changes from step to step (parameters,
optimizer, the caller's `state`, torch's generators) is in the checkpoint; so a run that was killed ends bitwise where
the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gulliver.core.errors import ConfigError, GulliverError
from gulliver.learning.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from gulliver.learning.optim import OptimizerConfig, Schedule, build_optimizer


@dataclass(frozen=True)
class LoopResult:
    """`losses`: mean loss of every step, the `resumed_from` steps that were found in the checkpoint included."""

    losses: list[float]
    resumed_from: int


def run_loop(
    *,
    parameters: list[dict[str, Any]],
    loss: Callable[[int], Tensor],
    steps: int,
    optimizer: OptimizerConfig,
    schedule: Schedule,
    max_grad_norm: float | None,
    accumulate: int = 1,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    state: dict[str, Tensor] | None = None,
    progress: Any = None,
    stage: str = "train",
    after_step: Callable[[int], None] | None = None,
) -> LoopResult:
    """Train `parameters` in place for `steps` updates, resuming from the file `checkpoint` when it exists.

    `parameters`: groups {"params": [...], "learning_rate"?: float, "weight_decay"?: float}; all of them are saved and
    restored. `loss(index)`: a differentiable scalar, or one loss per example whose mean counts, for micro-batch
    `index` in 0 ... steps * accumulate - 1; it must depend on nothing but `index`, `parameters` and `state`.
    `state`: further tensors that change during the run (running statistics), saved and restored in place.
    `after_step(step)` is called after the update of 0-based `step` and before its checkpoint. The last step is saved
    too, so a kill after it repeats nothing. ConfigError for a checkpoint of another run, GulliverError when a loss or
    gradient is not finite: the checkpoint then still holds the last good step.
    """
    for name, value in (("steps", steps), ("accumulate", accumulate), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if max_grad_norm is not None and not 0.0 < max_grad_norm < math.inf:
        raise ConfigError(f"max_grad_norm is {max_grad_norm}; it must be a positive number, or none")
    run = _Run(parameters, optimizer, state or {})
    dials = {"steps": steps, "accumulate": accumulate, "max_grad_norm": max_grad_norm}
    identity = {**dials, "optimizer": asdict(optimizer), "schedule": asdict(schedule), **run.shapes()}
    found = open_checkpoint(checkpoint) if checkpoint else None
    losses = run.restore(found, identity) if found else []
    start = len(losses)
    with nullcontext() if progress is None else progress.stage(stage, total=steps - start, unit="step") as bar:
        for step in range(start, steps):
            for group in run.updater.param_groups:
                group["lr"] = group["initial_lr"] * schedule.factor(step, steps)
            total = 0.0
            for micro in range(accumulate):
                total += _add_gradient(loss(step * accumulate + micro).mean(), step, accumulate)
            _update(run.updater, run.tensors, step, max_grad_norm)
            losses.append(total)
            if after_step is not None:
                after_step(step)
            if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                save_checkpoint(checkpoint, run.content(), {"identity": identity, "losses": losses})
            if bar is not None:
                bar.advance(note=f"loss {losses[-1]:.4g}")
    return LoopResult(losses, start)


def _add_gradient(value: Tensor, step: int, accumulate: int) -> float:
    """Add the gradient of one micro-batch's loss to the parameters'; returns its share of the step's mean loss."""
    number = float(value.detach())
    if not math.isfinite(number):
        raise GulliverError(f"the loss is {number} at step {step}; lower the learning rate or check the data")
    (value / accumulate if accumulate > 1 else value).backward()
    return number / accumulate


def _update(updater: torch.optim.Optimizer, tensors: list[Tensor], step: int, max_grad_norm: float | None) -> None:
    """Clip, update, and let go of the gradients."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not math.isfinite(float(norm)):
        raise GulliverError(f"the gradient's norm is {float(norm)} at step {step}; lower the learning rate")
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(tensors, max_grad_norm, norm)
    updater.step()
    updater.zero_grad(set_to_none=True)


class _Run:
    """What changes from step to step, and is in a checkpoint: parameters, optimizer, the caller's state, generators."""

    def __init__(
        self, parameters: list[dict[str, Any]], optimizer: OptimizerConfig, state: Mapping[str, Tensor]
    ) -> None:
        self.updater = build_optimizer(parameters, optimizer)
        self.updater.zero_grad(set_to_none=True)
        self.tensors: list[Tensor] = [tensor for group in self.updater.param_groups for tensor in group["params"]]
        trained = {id(tensor) for tensor in self.tensors}
        self.state = {name: tensor for name, tensor in state.items() if id(tensor) not in trained}

    def shapes(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be one of this run, beside the dials; as JSON."""
        groups = [
            {
                "learning_rate": group["initial_lr"],
                "weight_decay": group["weight_decay"],
                "shapes": [[str(tensor.dtype), *tensor.shape] for tensor in group["params"]],
            }
            for group in self.updater.param_groups
        ]
        state = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in sorted(self.state.items())}
        return {"groups": groups, "state": state}

    def content(self) -> dict[str, Tensor]:
        """All of it by name, nothing copied."""
        content = {f"parameter.{index}": tensor for index, tensor in enumerate(self.tensors)}
        for index, tensor in enumerate(self.tensors):
            values = self.updater.state[tensor].items()
            content |= {f"optimizer.{index}.{key}": value for key, value in values if isinstance(value, Tensor)}
        content |= {f"state.{name}": tensor for name, tensor in self.state.items()}
        for device in {tensor.device for tensor in self.tensors if tensor.device.type == "cuda"}:
            content[f"generator.cuda:{device.index}"] = torch.cuda.get_rng_state(device)
        return content | {"generator.cpu": torch.get_rng_state()}

    @torch.no_grad()
    def restore(self, found: Checkpoint, identity: dict[str, Any]) -> list[float]:
        """Fill in what the checkpoint holds, tensor by tensor; its losses. ConfigError when it is of another run."""
        theirs = found.meta.get("identity") or {}
        for key in sorted({*identity, *theirs}):
            if theirs.get(key) != identity.get(key):
                raise ConfigError(
                    f"the checkpoint {found.path} is of another run: {key} is {theirs.get(key)} there "
                    f"and {identity.get(key)} here; delete it to start afresh"
                )
        for name, value in found.tensors():
            part, _, rest = name.partition(".")
            if part == "parameter":
                self.tensors[int(rest)].copy_(value)
            elif part == "state":
                self.state[rest].copy_(value)
            elif name == "generator.cpu":
                torch.set_rng_state(value.clone())
            elif part == "generator":
                torch.cuda.set_rng_state(value.clone(), rest)
            else:
                index, _, key = rest.partition(".")
                owner = self.tensors[int(index)]
                like = owner if value.shape == owner.shape else torch.empty(value.shape, device=owner.device)
                kept = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
                self.updater.state[owner][key] = kept.copy_(value)
        return list(found.meta["losses"])
