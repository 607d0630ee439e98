"""The only training loop. Training, distillation and hardening differ in the loss they hand it, not in the loop.

For step t of T:  loss of `accumulate` micro-batches -> gradient -> clip to `max_grad_norm` -> update at the scheduled
rate. The loss is asked for micro-batch t * accumulate + k, and everything that changes from step to step (parameters,
optimizer, the caller's `state`, torch's generators) is in the checkpoint; so a run that was killed ends bitwise where
the uninterrupted one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gulliver.core.errors import ConfigError, GulliverError
from gulliver.learning.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from gulliver.learning.optim import OptimizerConfig, build_optimizer
from gulliver.learning.schedule import Schedule


@dataclass(frozen=True)
class LoopResult:
    """`losses`: mean loss of every step, those before a resume included. `seconds`: of this process alone.

    `resumed_from`: steps that were found finished in the checkpoint (0 for a fresh run).
    """

    losses: list[float]
    seconds: float
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
    _check(steps, accumulate, checkpoint_every, max_grad_norm)
    began = time.perf_counter()
    updater = build_optimizer(parameters, optimizer)
    tensors = [tensor for group in updater.param_groups for tensor in group["params"]]
    extra = {name: tensor for name, tensor in (state or {}).items() if not any(tensor is one for one in tensors)}
    identity = _identity(updater, steps, optimizer, schedule, max_grad_norm, accumulate, extra)
    updater.zero_grad(set_to_none=True)
    found = open_checkpoint(checkpoint) if checkpoint else None
    losses = _restore(found, updater, tensors, extra, identity) if found else []
    start = len(losses)
    with _bar(progress, stage, steps - start) as bar:
        for step in range(start, steps):
            _set_rates(updater, schedule.factor(step, steps))
            total = 0.0
            for micro in range(accumulate):
                total += _add_gradient(loss(step * accumulate + micro).mean(), step, accumulate)
            _update(updater, tensors, step, max_grad_norm)
            losses.append(total)
            if after_step is not None:
                after_step(step)
            if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                _save(checkpoint, updater, tensors, extra, identity, losses)
            if bar is not None:
                bar.advance(note=f"loss {losses[-1]:.4g}")
    return LoopResult(losses, time.perf_counter() - began, start)


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


def _set_rates(updater: torch.optim.Optimizer, factor: float) -> None:
    for group in updater.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _save(
    path: Path,
    updater: torch.optim.Optimizer,
    tensors: list[Tensor],
    extra: Mapping[str, Tensor],
    identity: dict[str, Any],
    losses: list[float],
) -> None:
    content = {f"parameter.{index}": tensor for index, tensor in enumerate(tensors)}
    for index, tensor in enumerate(tensors):
        for key, value in updater.state[tensor].items():
            if isinstance(value, Tensor):
                content[f"optimizer.{index}.{key}"] = value
    content |= {f"state.{name}": tensor for name, tensor in extra.items()}
    content |= {f"generator.{name}": value for name, value in _generators(tensors).items()}
    save_checkpoint(path, content, {"identity": identity, "losses": losses})


def _restore(
    found: Checkpoint,
    updater: torch.optim.Optimizer,
    tensors: list[Tensor],
    extra: Mapping[str, Tensor],
    identity: dict[str, Any],
) -> list[float]:
    """Fill parameters, optimizer, state and generators from the checkpoint, one tensor at a time; its losses."""
    theirs = found.meta.get("identity")
    if theirs != identity:
        keys = sorted(set(identity) | set(theirs or {}))
        key = next((key for key in keys if (theirs or {}).get(key) != identity.get(key)), "identity")
        raise ConfigError(
            f"the checkpoint {found.path} is of another run: {key} is {(theirs or {}).get(key)} there "
            f"and {identity.get(key)} here; delete it to start afresh"
        )
    with torch.no_grad():
        for name, value in found.tensors():
            part, _, rest = name.partition(".")
            if part == "parameter":
                tensors[int(rest)].copy_(value)
            elif part == "state":
                extra[rest].copy_(value)
            elif part == "generator":
                _set_generator(rest, value.clone())
            else:
                index, _, key = rest.partition(".")
                owner = tensors[int(index)]
                like = owner if value.shape == owner.shape else torch.empty(value.shape, device=owner.device)
                updater.state[owner][key] = torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
    return list(found.meta["losses"])


def _identity(
    updater: torch.optim.Optimizer,
    steps: int,
    optimizer: OptimizerConfig,
    schedule: Schedule,
    max_grad_norm: float | None,
    accumulate: int,
    extra: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be a checkpoint of this run, as JSON."""
    groups = [
        {
            "learning_rate": group["initial_lr"],
            "weight_decay": group["weight_decay"],
            "shapes": [[str(tensor.dtype), *tensor.shape] for tensor in group["params"]],
        }
        for group in updater.param_groups
    ]
    return {
        "steps": steps,
        "accumulate": accumulate,
        "max_grad_norm": max_grad_norm,
        "optimizer": asdict(optimizer),
        "schedule": asdict(schedule),
        "groups": groups,
        "state": {name: [str(tensor.dtype), *tensor.shape] for name, tensor in sorted(extra.items())},
    }


def _generators(tensors: list[Tensor]) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        states[f"cuda:{device.index}"] = torch.cuda.get_rng_state(device)
    return states


def _set_generator(device: str, state: Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


def _bar(progress: Any, stage: str, steps: int) -> AbstractContextManager[Any]:
    return nullcontext() if progress is None else progress.stage(stage, total=steps, unit="step")


def _check(steps: int, accumulate: int, checkpoint_every: int, max_grad_norm: float | None) -> None:
    for name, value in (("steps", steps), ("accumulate", accumulate), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if max_grad_norm is not None and not 0.0 < max_grad_norm < math.inf:
        raise ConfigError(f"max_grad_norm is {max_grad_norm}; it must be a positive number, or none")
